"""Advantages, losses and passes over a batch, worked out by hand."""

import pytest
import torch

from agents.core.actor import Evaluated
from agents.core.learner import MicroBatch
from agents.core.returns import Advantages
from agents.core.rollout import Rollout
from tests.conftest import tiny_model
from textenv.lm import Responses


def test_the_size_of_micro_batches_changes_no_gradient(agent):
    gradients = []
    for micro in (None, 1, 5):
        learner = agent(tiny_model(seed=5), micro_batch_size=micro, max_grad_norm=1e9)
        rollout = learner.collect()
        advantages = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
        learner.step(rollout, Advantages(advantages, advantages), torch.arange(20))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.actor.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_every_pass_learns_once_from_every_episode_of_the_batch(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=2, minibatches=4, micro_batch_size=3)
    rollout, seen = learner.collect(), []
    evaluate_batch = learner.actor.evaluate

    def spy(batch, *args, **kwargs):
        for prompt, count, response, length in zip(*batch, strict=True):
            seen.append((tuple(prompt[len(prompt) - count :].tolist()), tuple(response[:length].tolist())))
        return evaluate_batch(batch, *args, **kwargs)

    learner.actor.evaluate = spy
    learner.update(rollout)
    tokens = rollout.tokens
    played = [
        (tuple(tokens.prompt_ids[b, -tokens.prompt_lengths[b] :].tolist()), tuple(row[:length].tolist()))
        for b, (row, length) in enumerate(zip(tokens.response_ids, tokens.response_lengths, strict=True))
    ]
    assert sorted(seen) == sorted(played * 2)


def two_episodes():
    """Of two tokens and of one, which earned 3 and −1, with values that a critic might have given."""
    ids, zeros = torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    lengths, rewards, yes = torch.tensor([2, 1]), torch.tensor([3.0, -1.0]), torch.ones(2, dtype=torch.bool)
    values = torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    tokens = Responses(ids, torch.tensor([2, 2]), ids, lengths)
    return Rollout(tokens, zeros, values, rewards, zeros, 0.0, rewards, None, lengths, yes, ~yes)


def test_advantages_are_those_of_the_discount_and_the_lambda_of_the_config(agent):
    """γ = λ = ½. The second token: 3 − ½; the first: (½ · ½ − 1) + ¼ · 2.5. The other episode: −1 − 2."""
    learner = agent(gamma=0.5, lam=0.5, whiten_advantages=False)
    found = learner.advantages(two_episodes())
    assert found.advantages.tolist() == [[-0.125, 2.5], [-3.0, 0.0]]
    assert found.returns.tolist() == [[0.875, 3.0], [-1.0, 0.0]]


def test_by_default_each_token_pays_its_own_kl_and_advantages_are_returns_minus_values(agent):
    """Two nats, one a token, at β = ½ and a return of 3: the tokens earn −½ and 3½, so 3 and 3½ are still to come."""
    nats = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    found = agent(whiten_advantages=False).advantages(two_episodes()._replace(kl_per_token=nats, kl_coef=0.5))
    assert found.returns.tolist() == [[3.0, 3.5], [-1.0, 0.0]]
    assert found.advantages.tolist() == [[2.0, 3.0], [-3.0, 0.0]]


def test_advantages_are_whitened_over_the_real_tokens_and_returns_are_not(agent):
    """Mean −0.625 / 3, squares around it 0.0069444 + 7.3350694 + 7.7934028."""
    found = agent(gamma=0.5, lam=0.5).advantages(two_episodes())
    deviation = (15.1354167 / 3) ** 0.5
    expected = [0.0833333 / deviation, 2.7083333 / deviation, -2.7916667 / deviation, 0.0]
    assert found.advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert found.returns.tolist() == [[0.875, 3.0], [-1.0, 0.0]]


def test_the_loss_clips_ratios_and_values_and_weighs_the_values_as_the_config_says(agent):
    mask, zeros = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2)
    advantages, returns = torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
    old = MicroBatch(zeros, torch.tensor([[0.0, 0.5], [0.0, 0.0]]), advantages, returns, mask, tokens=3, episodes=2)
    new = Evaluated(torch.tensor([[1.5, 1.0], [0.8, 1.0]]).log(), torch.tensor([[1.0, 0.5], [0.1, 0.0]]), None)
    # At most 1.1 for the good token; the bad one costs 0.9 at least.
    policy = -(1.1 + 1.0 - 0.9) / 3
    loss, log = agent(clip_range=0.1, value_coef=0.5).loss(new, old)
    assert log["policy_loss"].item() == pytest.approx(policy)
    assert log["clip_fraction"].item() == pytest.approx(2 / 3)
    assert log["value_loss"].item() == pytest.approx(0.5 * (1.0 + 0.0 + 1.1**2) / 3)
    assert loss.item() == pytest.approx(policy + 0.5 * 0.5 * (1.0 + 0.0 + 1.1**2) / 3)
    # Twice as bad a token costs no more than 1.05 with a dual clip of that.
    risen = new._replace(logprobs=torch.tensor([[1.5, 1.0], [2.0, 1.0]]).log())
    for dual_clip, cost in ((None, 2.0), (1.05, 1.05)):
        _, log = agent(clip_range=0.1, dual_clip=dual_clip).loss(risen, old)
        assert log["policy_loss"].item() == pytest.approx(-(1.1 + 1.0 - cost) / 3)
    # The first value may move by a quarter: 0.25, which is 1.75 from its target.
    loss, log = agent(clip_range=0.1, value_coef=0.5, value_clip_range=0.25).loss(new, old)
    assert log["value_loss"].item() == pytest.approx(0.5 * (1.75**2 + 0.0 + 1.1**2) / 3)
    assert loss.item() == pytest.approx(policy + 0.5 * 0.5 * (1.75**2 + 0.0 + 1.1**2) / 3)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_entropy_bonus_raises_the_mean_entropy_of_the_allowed_tokens(agent, micro_batch_size):
    options = {"entropy_coef": 0.5, "value_coef": 0.0, "max_grad_norm": 1e9, "micro_batch_size": micro_batch_size}
    learner = agent(tiny_model(seed=5), env_options={"min_new_tokens": 1}, **options)
    rollout = learner.collect()
    nothing = torch.zeros_like(rollout.values)
    learner.step(rollout, Advantages(nothing, nothing), torch.arange(8))
    model, tokens, entropies = tiny_model(seed=5).model, rollout.tokens, []
    for b in range(8):
        prompt = tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
        response = tokens.response_ids[b, : int(tokens.response_lengths[b])]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        for t in range(len(response)):
            allowed = logits[len(prompt) + t - 1, 1 if t == 0 else 0 :]  # EOS, number 0, must not come first
            entropies.append(torch.distributions.Categorical(logits=allowed).entropy())
    (-0.5 * torch.stack(entropies).mean()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in learner.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-3)


def test_every_pass_has_an_order_of_its_own(agent):
    learner, seen = agent(epochs=3, minibatches=2), []
    log = dict.fromkeys(("ratio_max", "ratio_min", "update_tokens", "update_positions"), 1.0)
    learner.step = lambda rollout, targets, index: seen.append(index.tolist()) or log
    learner.update(learner.collect())
    assert [len(part) for part in seen] == [16] * 6
    passes = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(order) == list(range(32)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3


def test_losses_are_means_over_the_real_tokens_of_the_minibatch(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=1, minibatches=1, per_token_kl=False)
    rollout = learner.collect()
    # Values start at 0 and the reward stands at the end, so the target of every token is its episode's reward.
    squares = sum(n * r**2 for n, r in zip(rollout.tokens.response_lengths.tolist(), rollout.rewards.tolist()))
    expected = 0.5 * squares / rollout.tokens.response_lengths.sum().item()
    assert learner.update(rollout)["value_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("target_kl", "passes"), [(None, 4), (1e-9, 1), (1e9, 4)])
def test_passes_over_a_batch_end_once_the_policy_is_too_far_from_the_one_that_drew_it(agent, target_kl, passes):
    learner, steps = agent(learning_rate=1e-2, epochs=4, minibatches=2, target_kl=target_kl), []
    step = learner.step
    learner.step = lambda *args: steps.append(args) or step(*args)
    learner.update(learner.collect())
    assert len(steps) == 2 * passes


def seen_lengths(learner):
    """The lengths of the episodes of each pass that trains, from now on."""
    sizes, evaluate = [], learner.actor.evaluate

    def spy(batch, *args, **options):
        sizes.append(batch.total_lengths)
        return evaluate(batch, *args, **options)

    learner.actor.evaluate = spy
    return sizes


def test_passes_of_few_tokens_have_the_gradient_of_one_pass(agent):
    gradients, passes = [], []
    for most in (10_000, 20, 1):
        learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=1, minibatches=1, max_tokens_per_pass=most)
        sizes = seen_lengths(learner)
        learner.update(learner.collect())
        assert all(len(lengths) == 1 or lengths.sum() <= most for lengths in sizes)
        passes.append(len(sizes))
        gradients.append(torch.cat([weight.grad.flatten() for weight in learner.policy.model.parameters()]))
    assert passes[0] == 1 < passes[1] < passes[2] == 32
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_the_rewards_a_learner_sees_are_score_minus_beta_kl_on_the_last_token(agent):
    from textenv.scoring import spread_kl

    learner = agent(tiny_model(seed=5))
    rollout = learner.collect()
    assert (rollout.kl_per_token.sum(1).abs() > 0.01).float().mean() > 0.9
    torch.testing.assert_close(rollout.scores, rollout.rm_scores, atol=1e-4, rtol=0)
    lengths = rollout.tokens.response_lengths
    for per_token in (False, True):
        rewards = spread_kl(rollout.scores, rollout.kl_per_token, 0.1, lengths, per_token=per_token)
        torch.testing.assert_close(rewards.sum(1), rollout.rewards, atol=1e-5, rtol=0)
        after = torch.arange(rewards.shape[1]) >= lengths[:, None]
        assert (rewards[after] == 0).all()
        before = torch.arange(rewards.shape[1]) < (lengths - 1)[:, None]
        if not per_token:
            assert (rewards[before] == 0).all()
        else:
            torch.testing.assert_close(rewards[before], -0.1 * rollout.kl_per_token[before])
