"""Environments that each break one rule of the contract, for the conformance suite to find."""

import copy
import random
import threading

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from textenv.env import TextEnv
from textenv.lm import TokenRule
from textenv.vector import TextVectorEnv


class Sound(TextEnv):
    """Breaks nothing: a subclass as a user might write it."""


class ReusesItsBuffer(TextEnv):
    """Writes every observation into the arrays that it has already returned."""

    buffer = None

    def _observation(self):
        new = super()._observation()
        if self.buffer is None:
            self.buffer = new
        for key, value in new.items():
            self.buffer[key][...] = value
        return self.buffer


class HandsOutItsTokens(TextEnv):
    """Returns a view of the buffer that will be scored."""

    def _observation(self):
        return {**super()._observation(), "input_ids": self._episodes.tokens[0]}


class ReadsWhatItReturned(TextEnv):
    """Builds an observation from the previous one, which belongs to the caller by then."""

    last = None

    def _observation(self):
        new = super()._observation()
        if self.last is not None and new["response_length"][0]:
            width = self.task.prompt_width
            new["input_ids"][:width] = self.last["input_ids"][:width]
        self.last = new
        return {key: value for key, value in new.items()}


class KeepsItsInfo(TextEnv):
    """Returns the same dict of reward terms every time."""

    def __init__(self, **options):
        super().__init__(**options)
        self.terms = {}

    def step(self, action):
        *rest, info = super().step(action)
        if "reward_terms" in info:
            self.terms.update(info["reward_terms"])
            info["reward_terms"] = self.terms
        return *rest, info


class SeedsNumpy(TextEnv):
    def reset(self, *, seed=None, options=None):
        np.random.seed(0)  # noqa: NPY002
        return super().reset(seed=seed, options=options)


class DrawsFromPython(TextEnv):
    def step(self, action):
        random.random()
        return super().step(action)


class SeedsTorch(TextEnv):
    def __init__(self, **options):
        torch.manual_seed(0)
        super().__init__(**options)


class IgnoresTheSeed(TextEnv):
    def reset(self, *, seed=None, options=None):
        self.np_random  # noqa: B018
        return super().reset(options=options)


class CopiesTheReference(TextEnv):
    def __init__(self, **options):
        super().__init__(**options)
        self.task.reference = copy.deepcopy(self.task.reference)


class CopiesItForItsVector(TextVectorEnv):
    def __init__(self, num_envs=1, **options):
        super().__init__(num_envs, **options)
        copy.deepcopy(self.task.reference)


class HoldsALock(TextEnv):
    def __init__(self, **options):
        super().__init__(**options)
        self.lock = threading.Lock()


class DependsOnHowManyWereMade(TextEnv):
    made = 0

    def __init__(self, **options):
        super().__init__(**options)
        self.number = DependsOnHowManyWereMade.made
        DependsOnHowManyWereMade.made += 1

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={"prompt_id": self.number % len(self.task.prompts.ids)})


class LosesItsBetaWhenPickled(TextEnv):
    def __setstate__(self, state):
        self.__dict__.update(state)
        self.kl_coef = 0.0


class LooksLikeAGoal(TextEnv):
    def compute_reward(self, achieved, desired, info):
        return 0.0


class WrongDtype(TextEnv):
    def _observation(self):
        observation = super()._observation()
        if isinstance(observation, dict):
            observation["prompt_length"] = np.array([1.5], dtype=np.float32)
        return observation


class HasASeedMethod(TextEnv):
    """Has a method of old Gym, which Gymnasium's checker only warns about."""

    def seed(self, seed=None):
        pass


class AtTheEnd(TextEnv):
    """Changes what the last step returns."""

    def change(self, observation, reward, terminated, truncated, info):
        raise NotImplementedError

    def step(self, action):
        returned = super().step(action)
        return self.change(*returned) if returned[2] else returned


class EmitsBothFlags(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward, True, True, info


class TruncatesAtTheBudget(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        over = info["finish_reason"] == "length"
        return observation, reward, not over, over, info


class InventsAReason(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, {**info, "finish_reason": "done"}


class CallsLengthEos(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, {**info, "finish_reason": "eos"}


class CountsOneTokenLess(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, {**info, "response_length": info["response_length"] - 1}


class EndsTooSoonInWords(TextEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, info or {"finish_reason": "length"}


class NeverEnds(TextEnv):
    def step(self, action):
        if self._episodes.ended[0]:
            return self._observation(), 0.0, False, False, {}
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info


class PaysMoreThanItSays(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward + 0.01, terminated, truncated, info


class PaysNaN(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        info["reward_terms"]["bonus"] = float("nan")
        return observation, float("nan"), terminated, truncated, info


class PaysByMode(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        info["reward_terms"]["bonus"] = bonus = 0.5 if isinstance(observation, dict) else 0.0
        return observation, reward + bonus, terminated, truncated, info


class SaysAnother(AtTheEnd):
    """Reports another value for one key of the last info."""

    key = ""
    value = 0.5

    def change(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, {**info, self.key: self.value}


class SaysAnotherScore(SaysAnother):
    key = "rm_score"


class SaysAnotherBeta(SaysAnother):
    key = "kl_coef"


class SaysAnotherKL(SaysAnother):
    """Reports another KL per token, while the reward stays as it is."""

    key = "kl_per_token"
    value = np.zeros(6, dtype=np.float32)


class CutsTheKL(SaysAnother):
    key = "kl_per_token"
    value = np.zeros(3, dtype=np.float32)


class GoldIsNaN(SaysAnother):
    key = "gold_score"
    value = float("nan")


class KnowsAnUnknownKL(SaysAnother):
    key = "kl"
    value = 0.0


class PaysTwiceForTheReference(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        owed = info["reward_terms"]["reference_logprob"]
        terms = {**info["reward_terms"], "reference_logprob": 2 * owed}
        return observation, reward + owed, terminated, truncated, {**info, "reward_terms": terms}


class SaysAnotherSum(AtTheEnd):
    """Reports, and charges, a ``kl`` that is not the sum over its tokens."""

    def change(self, observation, reward, terminated, truncated, info):
        info["kl"] += 0.5
        info["reward_terms"]["kl"] -= 0.5 * info["kl_coef"]
        return observation, sum(info["reward_terms"].values()), terminated, truncated, info


class PaysEarly(TextEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward if terminated else 0.1, terminated, truncated, info


class DropsTheTerms(AtTheEnd):
    def change(self, observation, reward, terminated, truncated, info):
        del info["reward_terms"]
        return observation, reward, terminated, truncated, info


class PaysForTheKL(AtTheEnd):
    """Flips the sign of β everywhere."""

    def change(self, observation, reward, terminated, truncated, info):
        terms = {**info["reward_terms"], "kl": -info["reward_terms"]["kl"]}
        return observation, sum(terms.values()), terminated, truncated, {**info, "reward_terms": terms}


class OtherKL(AtTheEnd):
    """Uses another KL per token, consistently."""

    def per_token(self, k1, length):
        raise NotImplementedError

    def change(self, observation, reward, terminated, truncated, info):
        tokens = self.per_token(info["kl_per_token"].copy(), info["response_length"])
        kl = float(tokens.sum(dtype=np.float64))
        terms = {**info["reward_terms"], "kl": -info["kl_coef"] * kl}
        info = {**info, "kl_per_token": tokens, "kl": kl, "reward_terms": terms}
        return observation, sum(terms.values()), terminated, truncated, info


class FlipsTheKL(OtherKL):
    def per_token(self, k1, length):
        return -k1


class UsesK3(OtherKL):
    def per_token(self, k1, length):
        return np.expm1(-k1) + k1


class LeavesEosOut(OtherKL):
    def per_token(self, k1, length):
        k1[length - 1] = 0
        return k1


class ShiftsByOne(OtherKL):
    def per_token(self, k1, length):
        return np.roll(k1, 1)


class CountsPadding(OtherKL):
    def per_token(self, k1, length):
        k1[length:] = 0.1
        return k1


class TemperatureOnOneSide(TextEnv):
    def __init__(self, **options):
        super().__init__(**options)
        self.task.scorer.rule = TokenRule(stop_ids=self.task.rule.stop_ids)


class IgnoresWhatIsReported(TextEnv):
    def report_logprobs(self, logprobs):
        pass


class PadsTokensWithZero(TextEnv):
    def _observation(self):
        observation = super()._observation()
        return observation if isinstance(observation, dict) else np.maximum(observation, 0)


class PadsTokensWithMinusTwo(TextEnv):
    def _observation(self):
        observation = super()._observation()
        return observation if isinstance(observation, dict) else np.where(observation < 0, -2, observation)


class CountsOneResponseTokenMore(TextEnv):
    def _observation(self):
        observation = super()._observation()
        if isinstance(observation, dict):
            observation["response_length"] += 1
        return observation


class ShowsAnotherResponse(TextEnv):
    def _observation(self):
        observation = super()._observation()
        if isinstance(observation, dict):
            observation["input_ids"][self.task.prompt_width] = 5
        return observation


class PadsThePromptOnTheRight(TextEnv):
    def _observation(self):
        observation = super()._observation()
        if isinstance(observation, dict):
            width = self.task.prompt_width
            for key in ("input_ids", "attention_mask"):
                observation[key][:width] = observation[key][:width][::-1].copy()
        return observation


class MasksByEos(TextEnv):
    """Takes every EOS for padding, even the real one."""

    def _observation(self):
        observation = super()._observation()
        if isinstance(observation, dict):
            observation["attention_mask"][observation["input_ids"] == self.reference.eos_id] = 0
        return observation


class SaysNextStep(TextVectorEnv):
    def __init__(self, num_envs=1, **options):
        super().__init__(num_envs, **options)
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}


class HasAnotherSpace(TextVectorEnv):
    def __init__(self, num_envs=1, **options):
        super().__init__(num_envs, **options)
        self.single_action_space = spaces.Discrete(self.single_action_space.n + 1)


class AllowsEverything(TextVectorEnv):
    def action_masks(self):
        return np.ones_like(super().action_masks())


class DrawsFromEntropy(TextVectorEnv):
    def _begin(self, slots):
        self._rngs = [np.random.default_rng() for _ in self._rngs]
        return super()._begin(slots)


class SeedsAllSlotsAlike(TextVectorEnv):
    def reset(self, *, seed=None, options=None):
        seed = [seed] * self.num_envs if isinstance(seed, int) else seed
        return super().reset(seed=seed, options=options)


class FinalObservationOfTheNext(TextVectorEnv):
    def step(self, actions):
        observation, *rest, infos = super().step(actions)
        for slot in np.flatnonzero(infos.get("_final_obs", [])):
            infos["final_obs"][slot] = {key: value[slot].copy() for key, value in observation.items()}
        return observation, *rest, infos


class AddsTheMeanScore(TextVectorEnv):
    """Pays more if other episodes end at the same step."""

    def step(self, actions):
        observation, rewards, ended, *rest = super().step(actions)
        return observation, np.where(ended, rewards + 0.001 * ended.sum(), rewards), ended, *rest


class FloatRewards(TextVectorEnv):
    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        return observation, rewards.astype(np.float32), *rest


class KeepsOnGoing(TextVectorEnv):
    """Resets in the step that ends an episode, although NextStep should wait for the next one."""

    def step(self, actions):
        observation, *rest = super().step(actions)
        if self._resetting.any():
            self._begin(np.flatnonzero(self._resetting))
            self._resetting[:] = False
            observation = self._episodes.observe()
        return observation, *rest


class IgnoresTheResetMask(TextVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={k: v for k, v in (options or {}).items() if k != "reset_mask"})


class DrawsANewGenerator(TextVectorEnv):
    """The seed determines only the first prompt."""

    def _begin(self, slots):
        for slot in slots:
            self._rngs[slot] = seeding.np_random(1234)[0]
        return super()._begin(slots)


class ReturnsItsRewards(TextVectorEnv):
    buffer = None

    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        self.buffer = rewards if self.buffer is None else self.buffer
        self.buffer[:] = rewards
        return observation, self.buffer, *rest


class PlaysWithoutLogprobs(TextVectorEnv):
    def play(self, response_ids, response_lengths, logprobs=None):
        return super().play(response_ids, response_lengths)


class PlaysForMore(TextVectorEnv):
    def play(self, response_ids, response_lengths, logprobs=None):
        observation, rewards, *rest = super().play(response_ids, response_lengths, logprobs)
        return observation, rewards + 0.01, *rest


class ForgetsWhatItPlayed(TextVectorEnv):
    """Returns the observation of the prompt as the last one."""

    def play(self, response_ids, response_lengths, logprobs=None):
        before = self._episodes.observe()
        *rest, infos = super().play(response_ids, response_lengths, logprobs)
        if "final_obs" in infos:
            for slot in range(self.num_envs):
                infos["final_obs"][slot] = {key: value[slot] for key, value in before.items()}
            return *rest, infos
        return before, *rest[1:], infos


class PlaysWithoutReasons(TextVectorEnv):
    def play(self, response_ids, response_lengths, logprobs=None):
        *rest, infos = super().play(response_ids, response_lengths, logprobs)
        infos.get("final_info", infos)["finish_reason"][:] = "eos"
        return *rest, infos


class PlaysIntoTheNext(TextVectorEnv):
    """Draws one prompt too many after ``play``."""

    def play(self, response_ids, response_lengths, logprobs=None):
        returned = super().play(response_ids, response_lengths, logprobs)
        if self.autoreset_mode.value == "SameStep":
            self._begin(np.arange(self.num_envs))
        return self._episodes.observe(), *returned[1:]


class TruncatesWhatIsPlayed(TextVectorEnv):
    def play(self, response_ids, response_lengths, logprobs=None):
        observation, rewards, terminated, _, infos = super().play(response_ids, response_lengths, logprobs)
        return observation, rewards, terminated, ~terminated | True, infos
