"""RLOO, GRPO, REINFORCE, best-of-n, baselines: against hand-made numbers, enumeration and plain forward passes."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from agents.baselines import RandomAgent, ReferenceAgent
from agents.best_of_n import BestOfN, best_responses
from agents.core.actor import Evaluated
from agents.core.group import clipped_loss, group_advantages, leave_one_out_advantages, on_every_token
from agents.core.learner import MicroBatch
from agents.grpo import GRPO, GRPOConfig
from agents.online_dpo import OnlineDPO
from agents.ppo import PPO
from agents.reinforce import Reinforce, ReinforceConfig
from agents.rloo import RLOO, RLOOConfig
from tests.conftest import tiny_model
from textenv.evaluation import Evaluation, evaluate
from textenv.tasks.exact import exact_world

LEARNERS = [(RLOO, {"group_size": 4}), (GRPO, {"group_size": 4}), (Reinforce, {})]
LEARNERS += [(OnlineDPO, {"group_size": 2, "epochs": 2, "minibatches": 2})]


@pytest.fixture
def learner(make_vector):
    def make(kind, policy=None, num_envs=16, **config):
        settings = {"batch_size": 32, "learning_rate": 3e-3, "seed": 0, **config}
        return kind(make_vector(num_envs).unwrapped, kind.config_type(**settings), policy)

    return make


def gradient(agent):
    return torch.cat([p.grad.flatten() for p in agent.policy.model.parameters() if p.grad is not None])


def test_each_response_is_judged_by_the_mean_of_the_others():
    # Two groups: 1 − (2 + 6) / 2 = −3, 2 − 3.5, 6 − 1.5; then equal returns.
    returns = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out_advantages(returns, 3).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    # mean 3, sample variance (4 + 1 + 9) / 2 = 7
    expected = [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    assert group_advantages(returns, 3, normalize_std=False).tolist() == pytest.approx(expected)
    scaled = [x / math.sqrt(7) for x in expected]
    assert group_advantages(returns, 3, normalize_std=True).tolist() == pytest.approx(scaled, abs=1e-4)
    same = torch.tensor([0.3, 0.3 + 1e-7, 0.3 - 1e-7])  # one response three times, but for the rounding of a batch
    assert group_advantages(same, 3, normalize_std=True).abs().max() < 1e-2


def test_the_advantage_of_a_response_stands_on_its_tokens_and_nowhere_else():
    mask = torch.tensor([[True, True], [True, False]])
    assert on_every_token(torch.tensor([2.0, 3.0]), mask).tolist() == [[2.0, 2.0], [3.0, 0.0]]


def test_the_clipped_loss_divides_by_its_normalizer_and_reports_means_over_tokens():
    """Ratios 1.5, 1, 0.9 with ε = 0.2: the first of three tokens is outside; advantages 1, 1, −1."""
    mask = torch.tensor([[True, True], [True, False]])
    ratios = torch.tensor([[1.5, 1.0], [0.9, 1.0]])
    zeros = torch.zeros(2, 2)
    old = MicroBatch(zeros, zeros, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), zeros, mask, tokens=3, episodes=2)
    loss, log = clipped_loss(Evaluated(ratios.log(), zeros, None), old, clip_range=0.2, normalizer=8)
    assert float(loss) == pytest.approx(-(1.2 + 1.0 - 0.9) / 8)
    assert float(log["policy_loss"]) == pytest.approx(float(loss))
    assert float(log["clip_fraction"]) == pytest.approx(1 / 3)
    assert float(log["approx_kl"]) == pytest.approx((0.5 - math.log(1.5) - 0.1 - math.log(0.9)) / 3)


@pytest.mark.parametrize("k", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_by_k_minus_one_over_k(k):
    """Every group of k actions of a small softmax, weighted by its probability: no sampling error."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    logprobs = logits.log_softmax(0)
    got = {"leave one out": 0.0, "group mean": 0.0}
    for actions in itertools.product(range(3), repeat=k):
        chosen, index = logprobs[list(actions)], list(actions)
        weight = chosen.sum().exp().detach()
        loo = leave_one_out_advantages(rewards[index], k)
        mean = group_advantages(rewards[index], k, normalize_std=False)
        got["leave one out"] = got["leave one out"] + weight * (loo * chosen).sum() / k
        got["group mean"] = got["group mean"] + weight * (mean * chosen).sum() / k
    (loo,) = torch.autograd.grad(got["leave one out"], logits, retain_graph=True)
    (mean,) = torch.autograd.grad(got["group mean"], logits)
    torch.testing.assert_close(loo, exact, atol=1e-12, rtol=0)
    torch.testing.assert_close(mean, exact * (k - 1) / k, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (RLOO, {"group_size": 4}),
        (GRPO, {"group_size": 4}),
        (GRPO, {"group_size": 4, "normalize_std": False, "normalize_length": False}),
    ],
)
def test_the_gradient_is_that_of_advantages_times_plain_log_probabilities(learner, kind, config):
    agent = learner(kind, tiny_model(seed=5), max_grad_norm=1e9, **config)
    rollout = agent.collect()
    agent.update(rollout)
    got = gradient(agent)

    model = tiny_model(seed=5).model  # the weights before the step
    tokens, total = rollout.tokens, torch.zeros(())
    budget = agent.task.config.max_new_tokens
    for group in range(8):
        rows = range(4 * group, 4 * group + 4)
        returns = np.array([rollout.rewards[b].item() for b in rows])
        for b, own in zip(rows, returns, strict=True):
            length = int(tokens.response_lengths[b])
            if kind is RLOO:
                weight = (own - (returns.sum() - own) / 3) / budget
            else:
                weight = own - returns.mean()
                weight /= (returns.std(ddof=1) + 1e-4) * length if config.get("normalize_std", True) else budget
            prompt = tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
            ids = torch.cat([prompt, tokens.response_ids[b, :length]])[None]
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            chosen = [logprobs[len(prompt) + t - 1, ids[0, len(prompt) + t]] for t in range(length)]
            total = total - weight * torch.stack(chosen).sum() / 32
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_reinforce_weighs_log_probabilities_by_return_minus_value(learner):
    agent = learner(Reinforce, tiny_model(seed=5), max_grad_norm=1e9, per_token_kl=False)
    rollout = agent.collect()  # values start at 0: the advantage of every token is the return
    agent.update(rollout)
    model = tiny_model(seed=5).model
    tokens, total = rollout.tokens, torch.zeros(())
    for b in range(32):
        length, prompt = int(tokens.response_lengths[b]), tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
        ids = torch.cat([prompt, tokens.response_ids[b, :length]])[None]
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        chosen = [logprobs[len(prompt) + t - 1, ids[0, len(prompt) + t]] for t in range(length)]
        total = total - rollout.rewards[b] * torch.stack(chosen).sum() / (32 * agent.task.config.max_new_tokens)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient(agent), expected, atol=1e-5, rtol=1e-3)


def test_the_loss_of_reinforce_weighs_the_values_as_the_config_says(learner):
    """Log-probabilities −1, −2 and −0.5, advantages 1, 3 and −2, in two episodes of at most six tokens; values 1, 0
    and 0.5 instead of 2, 1 and 0.5."""
    mask, zeros = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2)
    advantages, returns = torch.tensor([[1.0, 3.0], [-2.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.5, 0.0]])
    old = MicroBatch(zeros, zeros, advantages, returns, mask, tokens=3, episodes=2)
    new = Evaluated(torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]]), None)
    loss, log = learner(Reinforce, value_coef=0.25).loss(new, old)
    assert log["policy_loss"].item() == pytest.approx((1 + 6 - 1) / 12)
    assert log["value_loss"].item() == pytest.approx(0.5 * (1 + 1 + 0) / 3)
    assert loss.item() == pytest.approx(6 / 12 + 0.25 / 3)


@pytest.mark.parametrize("per_token_kl", [False, True])
def test_reinforce_charges_the_last_token_with_all_of_the_kl_or_its_own(learner, per_token_kl):
    agent = learner(Reinforce, tiny_model(seed=5), per_token_kl=per_token_kl)
    rollout = agent.collect()  # values start at 0, so advantages are returns
    got = agent.advantages(rollout).advantages
    last = rollout.tokens.response_lengths[:, None] - 1
    own = rollout.kl_per_token.gather(1, last).squeeze(1)
    charged = own if per_token_kl else rollout.kl_per_token.sum(1)
    assert (own - rollout.kl_per_token.sum(1)).abs().max() > 0.1
    torch.testing.assert_close(got.gather(1, last).squeeze(1), rollout.rm_scores - 0.1 * charged, atol=1e-4, rtol=0)
    torch.testing.assert_close(got[:, 0], rollout.rewards, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
def test_only_an_algorithm_with_a_critic_trains_a_value_function(learner, kind, config):
    agent = learner(kind, **config).learn(64)
    head = agent.actor.value_head.output.linear
    trained = any(parameter is head.weight for group in agent.optimizer.param_groups for parameter in group["params"])
    assert trained == bool(head.weight.any()) == (kind is Reinforce)
    assert ("explained_variance" in agent.history[0]) == (kind is Reinforce)


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
def test_the_size_of_micro_batches_changes_no_gradient(learner, kind, config):
    gradients = []
    for micro in (None, 1, 5):
        agent = learner(kind, tiny_model(seed=5), micro_batch_size=micro, max_grad_norm=1e9, **config)
        agent.update(agent.collect())
        gradients.append(gradient(agent))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", [RLOO, GRPO])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_with_learning_rate_zero_every_ratio_is_one_in_every_epoch(learner, kind, micro_batch_size):
    config = {"epochs": 2, "minibatches": 3, "clip_range": 1e-4, "micro_batch_size": micro_batch_size}
    agent = learner(kind, tiny_model(seed=5), learning_rate=0.0, **config)
    log = agent.update(agent.collect())
    assert log["clip_fraction"] == 0.0
    assert log["approx_kl"] < 1e-8
    moving = learner(kind, tiny_model(seed=5), learning_rate=1e-3, **config)
    assert moving.update(moving.collect())["clip_fraction"] > 0.1  # so that the above does look


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
@pytest.mark.parametrize("poison", [float("nan"), 1e6])
def test_what_stands_on_padding_changes_nothing(learner, kind, config, poison):
    results = []
    for fill in (0.0, poison):
        agent = learner(kind, tiny_model(seed=5), **config)
        rollout = agent.collect()
        tokens, mask = rollout.tokens, rollout.tokens.response_mask
        assert not mask.all()
        spoilt = {
            name: torch.where(mask, getattr(rollout, name), fill) for name in ("logprobs", "values", "kl_per_token")
        }
        ids = torch.where(mask, tokens.response_ids, 7 if fill else 0)
        agent.update(rollout._replace(tokens=tokens._replace(response_ids=ids), **spoilt))
        results.append(list(agent.actor.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [RLOO, GRPO, OnlineDPO])
def test_the_responses_of_a_group_answer_one_prompt_and_groups_differ(learner, kind):
    agent = learner(kind, group_size=4)
    seen = set()
    for _ in range(4):
        groups = agent.collect().prompt_indices.reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
        seen |= {tuple(groups[:, 0].tolist())}
    assert len(seen) > 1  # new prompts every time


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
def test_n_updates_saved_loaded_and_n_more_equal_two_n(learner, kind, config, tmp_path):
    whole = learner(kind, **config)
    whole.learn(4 * 32)
    first = learner(kind, **config)
    first.learn(2 * 32)
    first.save(tmp_path / "checkpoint")
    second = kind.load(tmp_path / "checkpoint", learner(kind, **config).env)
    second.learn(2 * 32)
    for (name, one), other in zip(whole.actor.state_dict().items(), second.actor.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=f"it was written by {kind.__name__}.save"):
        PPO.load(tmp_path / "checkpoint", second.env)


@pytest.mark.parametrize(("kind", "config"), LEARNERS)
def test_learning_raises_the_reward(learner, kind, config):
    agent = learner(kind, **{**config, "learning_rate": 1e-2}).learn(20 * 32)
    rewards = [log["reward"] for log in agent.history]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RLOOConfig(group_size=1), "group_size must be 2 or more, got 1"),
        (lambda: GRPOConfig(batch_size=30, group_size=4), r"batch_size must be a multiple of group_size \(4\), got 30"),
        (lambda: ReinforceConfig(epochs=2), "must be 1 for REINFORCE.*, got 2 and 1. Use RLOO or PPO"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_slots_must_hold_whole_groups(make_vector):
    with pytest.raises(ValueError, match="num_envs must be a multiple of group_size, got 6 and 4"):
        RLOO(make_vector(6).unwrapped, RLOOConfig(batch_size=24, group_size=4))


def test_random_tokens_are_uniform_over_what_is_allowed_and_say_so(make_vector):
    env = make_vector(64, min_new_tokens=3).unwrapped
    size, stops = env.task.reference.vocab_size, len(env.task.rule.stop_ids)
    agent = RandomAgent(env.task, seed=0)
    observation, _ = env.reset(seed=0)
    sampled = agent.respond(observation)
    assert (sampled.response_lengths > 3).all()  # three tokens and one that may end
    for row, length in zip(sampled.logprobs.tolist(), sampled.response_lengths.tolist(), strict=True):
        expected = [-math.log(size - stops)] * 3 + [-math.log(size)] * (length - 3) + [0.0] * (len(row) - length)
        assert row == pytest.approx(expected, abs=1e-5)
    tokens, _ = agent.predict(observation)
    assert env.action_masks()[np.arange(64), tokens].all()
    assert evaluate(agent, env).kl.mean() > 0.1


def test_the_reference_has_no_kl():
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=6).unwrapped
    assert np.abs(evaluate(ReferenceAgent(env.task), env).kl).max() < 1e-5


@pytest.mark.parametrize("n", [1, 4])
def test_best_of_n_earns_what_enumeration_says_and_claims_no_kl(n):
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=600).unwrapped
    agent = BestOfN(env.task, ReferenceAgent(env.task).policy, n, seed=0)
    result = evaluate(agent, env, prompt_ids=np.tile(np.arange(6), 200))
    exact = exact_world(env).best_of_n(n).logprobs
    expected = exact_world(env).expected_reward(exact)
    assert abs(result.rm_scores.mean() - expected) < 4 * result.rm_scores.std() / math.sqrt(1200)
    assert result.kl is None
    np.testing.assert_array_equal(result.rewards, result.rm_scores)


def test_of_several_evaluations_each_prompt_keeps_all_of_its_best_answer_the_first_on_ties():
    def drawn(text, scores, reasons, shift):
        row = np.array(scores)
        return Evaluation(
            ["p", "q", "r"], [f"{text}{i}" for i in range(3)], np.arange(3), row - shift, row, row, row * 10,
            np.arange(3) + shift, reasons, np.full((3, 2), shift), row[:, None],
        )  # fmt: skip

    first = drawn("a", [1.0, 5.0, 2.0], ["eos", "length", "eos"], 1)
    second = drawn("b", [3.0, 4.0, 2.0], ["length", "eos", "stop"], 7)
    best = best_responses([first, second])
    assert (best.prompts, best.prompt_ids.tolist()) == (["p", "q", "r"], [0, 1, 2])
    assert (best.responses, best.finish_reasons) == (["b0", "a1", "a2"], ["length", "length", "eos"])
    assert (best.rm_scores.tolist(), best.gold.tolist()) == ([3.0, 5.0, 2.0], [30.0, 50.0, 20.0])
    assert (best.rewards.tolist(), best.lengths.tolist()) == ([-4.0, 4.0, 1.0], [7, 2, 3])
    assert best.response_ids.tolist() == [[7, 7], [1, 1], [1, 1]]
    assert best.kl_per_token is None
    assert best.kl is None  # being chosen is likelier than being drawn


def test_best_of_n_scores_each_prompt_with_its_own_columns(make_vector):
    """One prompt wants long responses and the other short ones: with columns mixed up, best-of-n picks the worst."""

    def signed_length(prompts, completions, way, **_):
        return [sign * len(text.split()) for sign, text in zip(way, completions, strict=True)]

    textenv.register_reward_model("signed-length", signed_length)
    prompts = [{"prompt": "red", "way": 1}, {"prompt": "the grass", "way": -1}]
    env = make_vector(60, prompts=prompts, reward_model="signed-length").unwrapped
    ids = np.tile([0, 1], 30)
    one, best = (
        evaluate(BestOfN(env.task, ReferenceAgent(env.task).policy, n), env, prompt_ids=ids).rm_scores for n in (1, 8)
    )
    for prompt in (0, 1):
        assert best[ids == prompt].mean() > one[ids == prompt].mean() + 0.3


def test_best_of_n_refuses_prompts_that_it_cannot_tell_apart_or_does_not_know(make_vector):
    alike = [{"prompt": "red", "way": 1}, {"prompt": "red", "way": -1}]
    task = make_vector(2, prompts=alike).unwrapped.task
    with pytest.raises(ValueError, match=r"\(prompts 0 and 1\)"):
        BestOfN(task, task.reference, 2)
    env = make_vector(2).unwrapped
    observation, _ = env.reset(options={"prompt": "sky is blue"})
    with pytest.raises(ValueError, match="got 'sky is blue'"):
        BestOfN(env.task, env.task.reference, 2).respond(observation)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "updates", "regret"), [(0, 90, 0.10), (1, 45, 0.15), (2, 45, 0.15)])
@pytest.mark.parametrize(("kind", "config"), [(RLOO, {}), (GRPO, {"normalize_std": False, "normalize_length": False})])
def test_rloo_and_grpo_come_near_the_optimum_of_the_exact_world(kind, config, seed, updates, regret):
    """Within 10 % in 90 updates; how near they come in more, on three seeds, is in benchmarks/results/agents.json."""
    env = gymnasium.make_vec("textenv/Micro-v0", num_envs=256).unwrapped
    settings = {"epochs": 2, "minibatches": 4, "learning_rate": 1e-3, "lr_decay_episodes": updates * 256}
    agent = kind(env, kind.config_type(seed=seed, **settings, **config)).learn(updates * 256)
    assert exact_world(env).measure(agent.policy.model).regret_ratio <= regret
