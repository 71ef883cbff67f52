"""Rules for an episode: how it ends, what it pays, its KL, and its observations."""

from typing import Any

import numpy as np
import torch

from textenv.conformance.subject import EOS_RATES, Episode, Subject, close, episodes, expect, expect_equal, expect_same


def endings(subject: Subject) -> str:
    """Only ``terminated`` ends an episode, within the budget, for a reason that its tokens show."""
    env, budget = subject.make(), subject.settings["max_new_tokens"]
    ending = env.unwrapped.reference.ending_ids
    reasons = []
    for episode in episodes(subject, env):
        for _, _, terminated, truncated, info in episode.steps:
            expect(not (terminated and truncated), "terminated and truncated must never both be set")
            expect(not truncated, "truncated must never be set. The budget is part of the task.")
            expect(terminated or "finish_reason" not in info, "finish_reason must come at the end only")
        info, count, last = episode.steps[-1][4], len(episode.steps), episode.actions[-1]
        reason = str(info.get("finish_reason"))
        ended = last in ending
        fits = {"eos": ended, "stop": not ended, "length": not ended and count == budget}
        expect(reason in fits, f"finish_reason must be one of {tuple(fits)}, got {reason!r}. Use one.")
        expect(fits[reason], f"finish_reason must fit the last token, {last}, and the length, {count}, got {reason!r}")
        expect_equal("response_length", info.get("response_length"), count, "It counts the ending token too.")
        reasons.append(reason)
    return f"{len(reasons)} episodes: {', '.join(sorted(set(reasons)))}"


def rewards(subject: Subject) -> str:
    """Zero before the end, then the sum of named terms."""
    env, terms = subject.make(), {}
    for episode in episodes(subject, env):
        expect(all(step[1] == 0 for step in episode.steps[:-1]), "rewards must be 0 before the last token")
        _, reward, _, _, info = episode.steps[-1]
        missing = {"reward_terms", "rm_score", "kl_coef", "kl_source", "prompt", "response"} - info.keys()
        expect(not missing, f"the last info must have {sorted(missing)}, got {sorted(info)}. Add them.")
        terms = info["reward_terms"]
        expect(all(np.isfinite(value) for value in terms.values()), f"reward_terms must be finite, got {terms}.")
        total = sum(terms.values())
        expect(close(reward, total, 1e-6), f"the reward must be the sum of reward_terms ({total}), got {reward}.")
        scored = [value for name, value in terms.items() if name.split("/")[0] == "reward_model"]  # itemised or not
        expect(bool(scored) and close(sum(scored), info["rm_score"], 1e-6), "reward_terms must add up to rm_score.")
        coefficient = env.unwrapped.kl_coef
        expect_equal("kl_coef", info["kl_coef"], coefficient, "Report the environment's own.")
        paid, owed = terms.get("kl", 0.0), -coefficient * info.get("kl", 0.0)
        expect(close(paid, owed, 1e-6), f"reward_terms['kl'] must be -kl_coef · kl ({owed}), got {paid}.")
        if "gold_score" in info:
            expect(np.isfinite(info["gold_score"]), f"gold_score must be finite, got {info['gold_score']}.")
    return f"{len(EOS_RATES)} episodes: zeros, then the sum of {', '.join(terms)}"


def kl(subject: Subject) -> str:
    """The KL is k1, token by token, by a plain forward pass of the reference without padding, batch or cache."""
    env = subject.make()
    sources = set()
    for episode in episodes(subject, env):
        info, length = episode.steps[-1][4], len(episode.steps)
        source = info["kl_source"]
        sources.add(source)
        want = "reported" if subject.settings["kl_source"] == "auto" else subject.settings["kl_source"]
        expect_equal("kl_source", source, want, "Log-probabilities were reported.")
        reference = reference_logprobs(subject, env.unwrapped, episode)
        if source == "reference":
            expect("kl" not in info, "an unknown KL must not be reported. Leave kl out.")
            owed = info["kl_coef"] * reference.sum()
            paid = info["reward_terms"].get("reference_logprob", np.nan)
            expect(close(paid, owed, 1e-3), f"reward_terms['reference_logprob'] must be {owed}, got {paid}.")
            continue
        own = np.array(episode.logprobs) if source == "reported" else reference
        per_token = np.asarray(info["kl_per_token"])
        expect_equal("shape of kl_per_token", per_token.shape, (subject.settings["max_new_tokens"],), "Pad with 0.")
        expect(not per_token[length:].any(), "kl_per_token must be 0 on padding. Clear it there.")
        found = difference_of(per_token[:length], own - reference)
        expect(found is None, f"kl_per_token must be log π − log π_ref, {found}.")
        expect(close(info["kl"], per_token.sum(dtype=np.float64)), "kl must be the sum of kl_per_token. Add it up.")
    return f"log π − log π_ref, token by token ({', '.join(sorted(sources))})"


def difference_of(got: np.ndarray, want: np.ndarray) -> str | None:
    wrong = np.flatnonzero(~np.isclose(got, want, rtol=1e-3, atol=1e-3))
    return f"{want[wrong[0]]:.4f} at response token {wrong[0]}, got {got[wrong[0]]:.4f}" if wrong.size else None


@torch.no_grad()
def reference_logprobs(subject: Subject, inner: Any, episode: Episode) -> np.ndarray:
    """log π_ref of an episode's actions, by a pass over one row and a float64 softmax over the allowed tokens."""
    observation = episode.start[0]
    if isinstance(observation, dict):
        prompt = observation["input_ids"][observation["attention_mask"] == 1]
    else:
        prompt = observation[observation >= 0]
    model = inner.reference.model
    ids = torch.tensor([[*prompt.tolist(), *episode.actions]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().cpu()
    rows = logits[len(prompt) - 1 : -1] / subject.settings["temperature"]
    rows[~torch.from_numpy(np.array(episode.masks))] = float("-inf")
    chosen = torch.tensor(episode.actions)
    return torch.log_softmax(rows, -1)[torch.arange(len(chosen)), chosen].numpy()


def observations(subject: Subject) -> str:
    """Both modes stay in their spaces and show the same tokens in the right columns."""
    width = subject.settings["max_prompt_tokens"]
    dicts, tokens = subject.make(obs_mode="dict"), subject.make(obs_mode="tokens")
    for one, other in zip(episodes(subject, dicts), episodes(subject, tokens), strict=True):
        expect_same([s[1:] for s in other.steps], [s[1:] for s in one.steps], "rewards or infos depend on obs_mode")
        seen = [one.start[0], *(step[0] for step in one.steps)]
        flat = [other.start[0], *(step[0] for step in other.steps)]
        prompt = int(seen[0]["prompt_length"][0])
        for t, (observation, ids) in enumerate(zip(seen, flat, strict=True)):
            expect(observation in dicts.observation_space, f"obs_mode='dict' must stay in its space, at step {t} too")
            expect(ids in tokens.observation_space, f"obs_mode='tokens' must stay in its space, at step {t} too")
            columns = np.arange(len(ids))
            real = (columns >= width - prompt) & (columns < width + t)
            got = {name: np.asarray(value).tolist() for name, value in observation.items()}
            expect_equal(f"attention_mask at step {t}", got["attention_mask"], real.astype(int).tolist())
            expect_equal(f"lengths at step {t}", [got["prompt_length"], got["response_length"]], [[prompt], [t]])
            response = got["input_ids"][width : width + t]
            expect_equal(f"the response, from column {width} at step {t},", response, one.actions[:t])
            want = np.where(real, observation["input_ids"], -1).tolist()
            expect_equal(f"obs_mode='tokens' at step {t}", ids.tolist(), want, "It shows what 'dict' shows, and −1.")
    return "dict and tokens: same episodes, prompt to the left of column P, response from it"
