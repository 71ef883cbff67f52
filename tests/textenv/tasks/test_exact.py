"""The exact oracles against recursion with a plain model, closed forms, finite differences and sampling."""

import copy
import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from tests.conftest import colour_score, tiny_model
from textenv.lm import TokenRule
from textenv.tasks.exact import ExactWorld, enumerate_responses, exact_world

RULE = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0, 5))
PROMPTS = ["what is the sky ?", "red", "is the not"]
BUDGET = 3


def shaken(model, seed, size=0.05):
    """A copy of a model, each weight moved at random: a policy some way off its reference."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def small():
    """Twelve words, three steps, two stop tokens, temperature, a banned early ending: everything a rule can say."""
    return ExactWorld(
        tiny_model(seed=1, spread=0.4), PROMPTS, colour_score, kl_coef=0.2, max_new_tokens=BUDGET, rule=RULE
    )


@pytest.fixture(scope="module")
def policy(small):
    return shaken(small.reference.model, seed=0)


@torch.no_grad()
def prefix_table(model, prompt):
    """Prefix → probabilities of the next token: plain transformers in float64, the rule written out.

    Prefixes of one length go through the model together, so no row is ever padded.
    """
    model = copy.deepcopy(model).double()
    out, prefixes = {}, [()]
    for length in range(BUDGET):
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1] / 0.8
        if length == 0:
            logits[:, [0, 5]] = -torch.inf
        out |= dict(zip(prefixes, torch.softmax(logits, -1).numpy(), strict=True))
        prefixes = [(*prefix, token) for prefix in prefixes for token in range(12) if token not in (0, 5)]
    return out


@pytest.fixture(scope="module")
def tables(small, policy):
    """One table a model and prompt."""
    encoded = [small.reference.encode_prompt(prompt) for prompt in PROMPTS]
    models = {"policy": policy, "reference": small.reference.model}
    return {name: [prefix_table(model, prompt) for prompt in encoded] for name, model in models.items()}


def strings_of(world):
    return [
        tuple(ids[:length]) for ids, length in zip(world.response_ids.tolist(), world.lengths.tolist(), strict=True)
    ]


def test_the_responses_are_all_that_can_be_written_each_once(small):
    """Filter all 12 + 12² + 12³ token lists by the rules, instead of growing them."""

    def complete(y):
        ends = [t for t, token in enumerate(y) if token in (0, 5)]
        return (ends == [len(y) - 1] and len(y) > 1) or (not ends and len(y) == BUDGET)

    every = [y for n in (1, 2, 3) for y in itertools.product(range(12), repeat=n) if complete(y)]
    got = strings_of(small)
    assert len(got) == len(set(got)) == 10 * 2 + 10 * 10 * 12
    assert set(got) == set(every)


def test_micro_has_2801_responses_to_each_of_six_prompts(world):
    """Ending at step n in 7^(n−1) ways, or never in 7^4: 1 + 7 + 49 + 343 + 2401."""
    assert world.rewards.shape == (6, 2801)


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_probabilities_equal_those_of_the_recursion(small, policy, tables, name):
    model = {"policy": policy, "reference": small.reference.model}[name]
    got = small.token_logprobs(model)
    for x, table in enumerate(tables[name]):
        for row, y in enumerate(strings_of(small)):
            want = [math.log(table[y[:t]][token]) for t, token in enumerate(y)]
            assert got[x, row, : len(y)].tolist() == pytest.approx(want, abs=1e-10)
            assert (got[x, row, len(y) :] == 0).all()


def test_probabilities_sum_to_one(small, policy, world):
    for total in (small.sequence_logprobs(policy).exp().sum(1), world.ref_logprobs.exp().sum(1)):
        assert (total - 1).abs().max() < 1e-12


def test_kl_over_strings_equals_the_sum_over_prefixes(small, policy, tables):
    """Chain rule: KL(π‖π_ref) = Σ_prefix π(prefix) KL(π(·|prefix) ‖ π_ref(·|prefix))."""
    total = 0.0
    for mine, theirs in zip(tables["policy"], tables["reference"], strict=True):
        for prefix, probs in mine.items():
            reach = math.prod(float(mine[prefix[:t]][token]) for t, token in enumerate(prefix))
            allowed = probs > 0
            total += reach * float(probs[allowed] @ np.log(probs[allowed] / theirs[prefix][allowed]))
    got = small.kl(small.sequence_logprobs(policy))
    assert got > 0.05
    assert got == pytest.approx(total / len(PROMPTS), rel=1e-9)


def test_objective_is_reward_minus_kl_by_the_recursion(small, policy, tables):
    """And the rewards are those of the texts: colour_score of what is decoded, with the ending it had."""
    total = 0.0
    for prompt, mine, theirs in zip(PROMPTS, tables["policy"], tables["reference"], strict=True):
        for y in strings_of(small):
            p = math.prod(float(mine[y[:t]][token]) for t, token in enumerate(y))
            q = math.prod(float(theirs[y[:t]][token]) for t, token in enumerate(y))
            reason = {0: "eos", 5: "stop"}.get(y[-1], "length")
            text = small.reference.tokenizer.decode([token for token in y if token not in (0, 11)])  # EOS and unknown
            (score,) = colour_score([prompt], [text], finish_reason=[reason])
            total += p * (score - 0.2 * math.log(p / q))
    assert float(small.objective(small.sequence_logprobs(policy))) == pytest.approx(total / len(PROMPTS), rel=1e-9)


@pytest.mark.parametrize("per_token_kl", [False, True])
def test_values_solve_the_bellman_equation(small, policy, tables, per_token_kl):
    """V(prefix) = Σ_a π(a|prefix) (reward of a + V(prefix + a)), from the ends backwards."""
    rewards = [dict(zip(strings_of(small), row.tolist(), strict=True)) for row in small.rewards]
    got = small.values(small.token_logprobs(policy), per_token_kl=per_token_kl)

    for x, (mine, theirs) in enumerate(zip(tables["policy"], tables["reference"], strict=True)):

        def value(prefix, spent, x=x, mine=mine, theirs=theirs):
            total = 0.0
            for token, p in enumerate(mine[prefix].tolist()):
                if p == 0.0:
                    continue
                kl = math.log(p / float(theirs[prefix][token]))
                y = (*prefix, token)
                if y in rewards[x]:
                    owed = kl if per_token_kl else spent + kl
                    total += p * (rewards[x][y] - 0.2 * owed)
                else:
                    paid = -0.2 * kl if per_token_kl else 0.0
                    total += p * (paid + value(y, spent + kl))
            return total

        for row in range(0, len(small.lengths), 97):
            y = strings_of(small)[row]
            for t in range(len(y)):
                spent = sum(math.log(mine[y[:k]][y[k]] / theirs[y[:k]][y[k]]) for k in range(t))
                assert float(got[x, row, t]) == pytest.approx(value(y[:t], spent), abs=1e-9)
            assert (got[x, row, len(y) :] == 0).all()


def test_the_value_of_the_start_is_the_objective(world):
    logprobs = world.token_logprobs(shaken(world.reference.model, 1))
    objective = float(world.objective(logprobs.sum(2)))
    for per_token_kl in (False, True):
        start = world.values(logprobs, per_token_kl=per_token_kl)[:, :, 0]
        assert float(start.mean()) == pytest.approx(objective, abs=1e-10)
        assert float(start.std(1).max()) < 1e-12


def random_policies(world, seed=0):
    """Distributions over responses near the reference, near the optimum, and anywhere."""
    generator = torch.Generator().manual_seed(seed)
    best = world.optimum().logprobs
    for centre in (world.ref_logprobs, best, torch.zeros_like(best)):
        for size in (0.0, 0.1, 0.5, 2.0, 5.0):
            noise = torch.randn(centre.shape, generator=generator, dtype=torch.float64)
            yield torch.log_softmax(centre + size * noise, 1)


def test_the_optimum_has_the_objective_j_star_and_nobody_exceeds_it(world):
    best = world.optimum()
    assert float(world.objective(best.logprobs)) == pytest.approx(best.objective, abs=1e-12)
    for logprobs in random_policies(world):
        assert float(world.objective(logprobs)) <= best.objective + 1e-12


def test_the_two_regrets_agree(world):
    """J* − J(π) = β KL(π ‖ π*), with π* normalised here from its definition."""
    weight = world.ref_logprobs.exp() * (world.rewards / 0.3).exp()
    star = weight / weight.sum(1, keepdim=True)
    seen = []
    for logprobs in random_policies(world):
        divergence = 0.3 * (logprobs.exp() * (logprobs - star.log())).sum(1).mean()
        assert world.regret(logprobs) == pytest.approx(float(divergence), abs=1e-10)
        seen.append(world.regret(logprobs))
    assert max(seen) > 1.0
    assert min(seen) < 1e-12


def test_regret_ratio_is_one_at_the_reference_and_measures_hang_together(world):
    assert world.measure(world.reference.model).regret_ratio == pytest.approx(1.0, abs=1e-12)
    measured = world.measure(shaken(world.reference.model, 3))
    assert measured.objective == pytest.approx(measured.expected_reward - 0.3 * measured.kl, abs=1e-12)
    assert measured.objective + measured.regret == pytest.approx(world.optimum().objective, abs=1e-12)
    assert measured.kl > 0.01
    assert measured.regret_ratio != pytest.approx(1.0, abs=1e-3)


def test_the_gradient_is_that_of_finite_differences(small, policy):
    gradient = small.gradient(policy)
    assert gradient.dtype == torch.float64
    double = copy.deepcopy(policy).double()
    start = torch.nn.utils.parameters_to_vector(double.parameters()).detach()
    assert gradient.shape == start.shape
    generator = torch.Generator().manual_seed(0)

    def objective(vector):
        torch.nn.utils.vector_to_parameters(vector, double.parameters())
        return float(small.objective(small.sequence_logprobs(double)))

    for _ in range(3):
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        slope = (objective(start + step) - objective(start - step)) / 2e-6
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-5, abs=1e-7)


def test_the_gradient_leads_uphill_and_vanishes_nowhere_near_the_reference(world):
    model = copy.deepcopy(world.reference.model)
    before = world.measure(model).objective
    gradient = world.gradient(model)
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters((vector + 1e-3 * gradient).float(), model.parameters())
    gained = world.measure(model).objective - before
    assert gained == pytest.approx(1e-3 * float(gradient @ gradient), rel=0.1)  # first order
    assert gained > 1e-4


def test_measuring_changes_no_model(world):
    model = shaken(world.reference.model, 2)
    kept = copy.deepcopy(model.state_dict())
    world.measure(model)
    world.gradient(model)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert all(parameter.dtype == torch.float32 and parameter.grad is None for parameter in model.parameters())


def test_the_world_of_an_environment_pays_what_the_environment_pays(text_options):
    """Stop tokens, a missing-EOS penalty and prompt columns included; the environment is played step by step."""

    def generous(prompts, completions, bonus, **columns):
        return [b + score for b, score in zip(bonus, colour_score(prompts, completions, **columns), strict=True)]

    textenv.register_reward_model("generous", generous)
    options = text_options | {
        "prompts": [{"prompt": "red", "bonus": 2.0}, {"prompt": "is the not", "bonus": -1.0}],
        "reward_model": "generous",
        "max_new_tokens": 3,
        "stop_tokens": ["?"],
        "missing_eos_penalty": 0.7,
        "kl_coef": 0.0,
    }
    env = gymnasium.make("textenv/Text-v0", **options)
    exact = exact_world(env)
    rows = {y: row for row, y in enumerate(strings_of(exact))}
    rng = np.random.default_rng(0)
    endings = set()
    for episode in range(60):
        env.reset(options={"prompt_id": episode % 2})
        y, ended = (), False
        while not ended:
            token = int(rng.choice([0, 3, 4, 9], p=[0.2, 0.4, 0.2, 0.2]))
            _, reward, ended, _, info = env.step(token)
            y = (*y, token)
        endings.add(info["finish_reason"])
        assert float(exact.rewards[episode % 2, rows[y]]) == pytest.approx(reward, abs=1e-6)
    assert endings == {"eos", "stop", "length"}


def test_single_and_vector_environments_have_the_same_world():
    one = exact_world(gymnasium.make("textenv/Micro-v0", kl_coef=0.5))
    many = exact_world(gymnasium.make_vec("textenv/Micro-v0", num_envs=3, kl_coef=0.5))
    assert one.kl_coef == many.kl_coef == 0.5
    assert torch.equal(one.rewards, many.rewards)
    assert torch.equal(one.ref_logprobs, many.ref_logprobs)


def test_bad_input_gets_one_clear_error(world):
    with pytest.raises(ValueError, match=r"vocabulary 50 and max_new_tokens 9"):
        enumerate_responses(50, 9, TokenRule(stop_ids=(0,)))
    with pytest.raises(ValueError, match=r"kl_coef > 0, got 0"):
        world.tilted(0)
    with pytest.raises(ValueError, match="n ≥ 1, got 0"):
        world.best_of_n(0)
