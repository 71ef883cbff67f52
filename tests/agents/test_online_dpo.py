"""Online DPO: its pairs by hand, its gradient by plain forward passes, its optimum by enumeration."""

import math

import gymnasium
import pytest
import torch
from torch.nn.functional import softplus

import textenv
from agents.core.job import Job
from agents.online_dpo import OnlineDPO, OnlineDPOConfig, pairs_of
from agents.presets import preset
from tests.agents.core.test_exact_gradient import moved, relative_error
from tests.agents.core.test_learner_gradient import every_group, expected_gradient
from tests.conftest import tiny_model
from textenv.lm import TokenRule, response_logprobs
from textenv.lm.load import wrap_language_model
from textenv.tasks.exact import exact_world

SURE, UNSURE = 1 / (1 + math.exp(-1)), 1 / (1 + math.e)  # σ(1) and σ(−1)


@pytest.fixture
def learner(make_vector):
    def make(policy=None, env=None, **config):
        settings = {"batch_size": 16, "group_size": 2, "learning_rate": 3e-3, "max_grad_norm": None, **config}
        return OnlineDPO(make_vector(16, **(env or {})).unwrapped, OnlineDPOConfig(**settings), policy)

    return make


@pytest.fixture(scope="module")
def world():
    """The exact world with a budget of two tokens: 57 responses, 3,249 pairs of them a prompt."""
    return exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=2))


# Two pairs with β = ½: log-ratios 1 and −1, scores 2 and 1; then log-ratios 0 and 2 and equal scores.
RATIOS, SCORES = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.5, 0.5 + 1e-7])


@pytest.mark.parametrize(
    ("soft", "labels", "first_loss", "slopes"),
    [
        # The first gap is what its label wants: the loss is the entropy of σ(1), and nothing pulls.
        (True, [SURE, 0.5], -SURE * math.log(SURE) - UNSURE * math.log(UNSURE), [0, 0, UNSURE - 0.5, 0.5 - UNSURE]),
        (False, [1, 0.5], -math.log(SURE), [-UNSURE, UNSURE, UNSURE - 0.5, 0.5 - UNSURE]),
    ],
)
def test_the_loss_of_two_pairs_and_its_slopes_are_those_done_by_hand(soft, labels, first_loss, slopes):
    ratios = RATIOS.clone().requires_grad_()
    pairs = pairs_of(ratios, SCORES, 2, beta=0.5, soft_labels=soft)
    assert pairs.gaps.flatten().tolist() == [1, -1]
    assert pairs.labels.flatten().tolist() == pytest.approx(labels, abs=1e-6)
    assert pairs.losses.tolist() == pytest.approx([first_loss, -(math.log(SURE) + math.log(UNSURE)) / 2])
    assert pairs.accuracy.item() == pytest.approx(0.75)  # a tie counts one half
    assert pairs.margin.item() == pytest.approx(0.5)
    pairs.losses.sum().backward()
    assert ratios.grad.tolist() == pytest.approx([slope / 2 for slope in slopes], abs=1e-6)


def test_a_prompt_with_three_responses_has_the_mean_of_its_three_pairs():
    ratios, scores = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([3.0, 1.0, 2.0])
    pairs = pairs_of(ratios, scores, 3, beta=1.0, soft_labels=False)
    assert pairs.gaps.tolist() == [[-1, -3, -2]]
    assert pairs.labels.tolist() == [[1, 1, 0]]
    assert pairs.losses.item() == pytest.approx(sum(math.log1p(math.exp(x)) for x in (1, 3, -2)) / 3)
    assert pairs.accuracy.item() == pytest.approx(1 / 3)
    assert pairs.margin.item() == pytest.approx((-1 - 3 + 2) / 3)


def drawn_by(world, log_ratios, size):
    """Every group of responses to each prompt as one rollout of a policy with these log-ratios."""
    rollout, row, _ = every_group(world, world.reference.model, size)
    kl = torch.zeros_like(rollout.kl_per_token)
    kl[:, 0] = log_ratios.flatten()[row]
    return rollout._replace(kl_per_token=kl, rewards=world.rewards.flatten()[row] - world.kl_coef * kl[:, 0])


@pytest.mark.parametrize(("budget", "size"), [(2, 2), (1, 3)])
def test_soft_labels_leave_the_exact_optimum_where_it_is_and_hard_labels_do_not(budget, size):
    """At π ∝ π_ref exp(r/β) the pull on every response in every group is 0, whoever draws the groups."""
    world = exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=budget))
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=6, max_new_tokens=budget).unwrapped

    def pulls(log_ratios, soft):
        config = OnlineDPOConfig(batch_size=6, group_size=size, soft_labels=soft)
        return OnlineDPO(env, config).advantages(drawn_by(world, log_ratios, size)).advantages

    best = world.optimum().logprobs - world.ref_logprobs
    assert pulls(best, soft=True).abs().max() < 1e-9
    for changed in (0.9 * best, torch.zeros_like(best)):  # β too high, the reference
        assert pulls(changed, soft=True).abs().max() > 1e-3
    assert pulls(best, soft=False).abs().max() > 1e-2


def minimised(world, soft):
    """Log-probabilities of a free table of responses after minimising the loss of all pairs of them."""
    logits = world.ref_logprobs.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        h = (logits.log_softmax(1) - world.ref_logprobs).flatten()
        total = pairs_of(h, world.rewards.flatten(), logits.shape[1], beta=world.kl_coef, soft_labels=soft).losses.sum()
        total.backward()
        return total

    optimizer.step(loss)
    return logits.detach().log_softmax(1)


def test_minimising_the_loss_of_all_pairs_ends_at_the_optimum_with_soft_labels_alone(world):
    reference = world.regret(world.ref_logprobs)
    assert world.regret(minimised(world, soft=True)) < 1e-6 * reference
    assert world.regret(minimised(world, soft=False)) > reference


@pytest.mark.parametrize("soft", [True, False])
def test_the_expected_gradient_is_that_of_the_enumerated_loss(world, soft):
    """Each pair weighs by the chance that the policy draws it; the loss is written out anew, from π and π_ref."""
    policy = moved(world)
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=4, max_new_tokens=2).unwrapped
    config = OnlineDPOConfig(batch_size=4, group_size=2, soft_labels=soft)
    agent = OnlineDPO(env, config, wrap_language_model(moved(world), world.reference.tokenizer))
    agent.actor.double()
    got = expected_gradient(agent, world, policy, size=2)

    model = moved(world).double()
    logprobs = world.differentiable_logprobs(model).sum(2)
    implicit = 0.3 * (logprobs - world.ref_logprobs)
    gaps, differences = (x[:, :, None] - x[:, None, :] for x in (implicit, world.rewards))
    label = differences.sigmoid() if soft else 0.5 + 0.5 * differences.sign()
    nll = label * softplus(-gaps) + (1 - label) * softplus(gaps)
    drawn = (logprobs[:, :, None] + logprobs[:, None, :]).exp().detach()
    loss = (drawn * nll).sum((1, 2)).mean()
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])
    assert relative_error(-got, expected) < 1e-9


def test_small_differences_pull_like_rloo_times_a_quarter_of_beta():
    ratios, scores = torch.tensor([2e-3, -1e-3]).double().requires_grad_(), torch.tensor([-1e-3, 3e-3]).double()
    pairs_of(ratios, scores, 2, beta=0.3, soft_labels=True).losses.sum().backward()
    returns = scores - 0.3 * ratios.detach()
    assert -ratios.grad[0].item() == pytest.approx(0.3 / 4 * float(returns[0] - returns[1]), rel=1e-4)


def plain_log_ratio(model, reference, tokens, b):
    prompt = tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
    response = tokens.response_ids[b, : int(tokens.response_lengths[b])]
    ids = torch.cat([prompt, response])[None]
    chosen = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, reference)]
    own, ref = (logprobs.gather(1, response[:, None]).sum() for logprobs in chosen)
    return own - ref.detach()


@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
@pytest.mark.parametrize("group_size", [2, 4])
def test_a_step_has_the_gradient_of_its_pairs_for_the_policy_as_it_now_is(learner, micro_batch_size, group_size):
    """The policy has moved since it drew the pairs, and micro-batches split them."""
    agent = learner(tiny_model(seed=5), epochs=2, micro_batch_size=micro_batch_size, group_size=group_size)
    rollout = agent.collect()
    agent.policy.model.load_state_dict(tiny_model(seed=6).model.state_dict())
    targets, index = agent.advantages(rollout), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    log = agent.step(rollout, targets, index)
    got = torch.cat([p.grad.flatten() for p in agent.policy.model.parameters()])

    model, reference = tiny_model(seed=6).model, agent.env.reference.model
    h = torch.stack([plain_log_ratio(model, reference, rollout.tokens, b) for b in range(8)]).view(-1, group_size)
    scores = rollout.rm_scores[:8].view(-1, group_size)
    rows = [(i, j) for i in range(group_size) for j in range(i + 1, group_size)]
    losses = []
    for g in range(len(h)):
        for i, j in rows:
            p, gap = torch.sigmoid(scores[g, i] - scores[g, j]), 0.1 * (h[g, i] - h[g, j])
            losses.append(p * softplus(-gap) + (1 - p) * softplus(gap))
    loss = torch.stack(losses).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)
    assert log["policy_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_one_step_per_batch_reads_the_log_ratios_off_the_episodes(learner):
    once, twice = (learner(tiny_model(seed=5), epochs=epochs) for epochs in (1, 2))
    for agent in (once, twice):
        rollout = agent.collect()
        agent.step(rollout, agent.advantages(rollout), torch.arange(16))
    gradients = [torch.cat([p.grad.flatten() for p in agent.policy.model.parameters()]) for agent in (once, twice)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-3)


def test_every_step_has_whole_groups_and_a_pass_has_each_response_once(learner):
    agent = learner(group_size=4, minibatches=3)
    parts = agent.minibatches(agent.collect())
    assert [len(part) for part in parts] == [8, 4, 4]
    assert sorted(torch.cat(parts).tolist()) == list(range(16))
    for group in torch.cat(parts).view(-1, 4):
        assert group.tolist() == list(range(int(group[0]), int(group[0]) + 4))
        assert group[0] % 4 == 0


@pytest.mark.parametrize("soft", [True, False])
def test_equal_scores_teach_nothing(learner, soft):
    textenv.register_reward_model("one", lambda prompts, completions: [1.0] * len(prompts))
    agent = learner(env={"reward_model": "one"}, soft_labels=soft, epochs=2, minibatches=2)
    log = agent.learn(5 * 16).history[-1]
    assert log["policy_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(log["kl"]) < 1e-3
    assert all(torch.isfinite(weight).all() for weight in agent.actor.parameters())


def test_scores_are_those_before_the_kl_with_the_penalty_for_not_ending(learner):
    agent = learner(tiny_model(seed=5), env={"missing_eos_penalty": 7.0})
    rollout = agent.collect()
    assert not rollout.ended.all()
    expected = rollout.rm_scores - 7.0 * ~rollout.ended
    torch.testing.assert_close(rollout.scores, expected, atol=1e-5, rtol=0)


def test_the_log_ratios_are_those_of_policy_and_reference_under_the_rule_of_the_environment(learner):
    rule = {"temperature": 0.7, "min_new_tokens": 2}
    agent = learner(tiny_model(seed=5), env=rule)
    rollout = agent.collect()
    models = agent.policy.model, agent.env.reference.model
    own, ref = (response_logprobs(model, rollout.tokens, TokenRule(stop_ids=(0,), **rule)) for model in models)
    torch.testing.assert_close(rollout.kl_per_token, own - ref, atol=1e-5, rtol=0)


def test_a_job_of_an_experiment_starts_from_the_preset(tmp_path):
    trained = OnlineDPO.train(Job("textenv/Micro-v0", {"batch_size": 16}, 0, 16, tmp_path / "run"))
    config = trained.agent.config
    assert (config.learning_rate, config.lr_decay_episodes) == (1e-3, 16)
    assert OnlineDPO.load(tmp_path / "run", trained.agent.env).config == config


@pytest.mark.parametrize(
    ("env", "config", "message"),
    [
        ({"kl_source": "reference"}, {}, "kl_source must be 'auto' or 'reported' .*, got 'reference'. Leave"),
        ({"kl_coef": 0.0}, {}, r"kl_coef must be above 0 for online DPO, whose β it is, got 0\.0"),
        ({}, {"group_size": 1}, "group_size must be 2 or more, got 1"),
        ({}, {"group_size": 4, "minibatches": 5}, r"minibatches must be batch_size / group_size \(4\) or less, got 5"),
        ({}, {"batch_size": 15}, r"batch_size must be a multiple of group_size \(2\), got 15"),
    ],
)
def test_wrong_settings_are_refused(learner, env, config, message):
    with pytest.raises(ValueError, match=message):
        learner(env=env, **config)


@pytest.mark.slow
def test_online_dpo_comes_within_eight_percent_of_the_optimum_of_the_exact_world():
    """In 100 updates; how near it comes in more is in benchmarks/results/agents.json."""
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=256).unwrapped
    agent = OnlineDPO(env, OnlineDPOConfig(**preset("micro", "online-dpo", total_episodes=100 * 256)))
    agent.learn(100 * 256)
    assert exact_world(env).measure(agent.policy.model).regret_ratio <= 0.08
