"""Figures that no healthy run has. Each alarm is printed once, and marked in the log of every update that has it."""

import logging
from collections.abc import Mapping, Sequence

from textenv.config import TaskConfig

_log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""How far rounding alone may move a ratio from 1, or the KL of a response below 0 (nats), by ``dtype``."""

SAMPLER_GAP = 0.05
"""How far rounding alone may move a server's log-probabilities, nats per token: it may compute in another precision."""


def alarms(log: Mapping[str, float], history: Sequence[Mapping[str, float]], task: TaskConfig) -> dict[str, float]:
    """The alarms of an update as ``{"alarm_kl": 1.0}``; those that ``history`` does not have yet go to stderr."""
    tolerance = TOLERANCE[task.dtype]
    found = {}
    if log["kl"] + 4 * log.get("kl_se", float("inf")) < -tolerance:
        found["alarm_kl"] = (
            f"the KL of the batch is {log['kl']:.3g} nats, more than 4 standard errors ({log['kl_se']:.2g}) below 0, "
            "which no KL can be. The policy's log-probabilities are not those of the distribution that was sampled, "
            "or the reference's follow another rule. Likely causes: temperature, minimum length, top-k or top-p on "
            "one side only; dropout; a mask that takes EOS for padding; an agent that reports log-probabilities of "
            "other weights. Rewards are wrong until this is found"
        )
    if not log["first_ratio_deviation"] <= tolerance:
        found["alarm_ratio"] = (
            f"a ratio is off by {log['first_ratio_deviation']:.2g} before the first step, where all must be 1 (to "
            f"{tolerance:g} in {task.dtype}). The pass that trains does not compute what was sampled. Likely causes: "
            "dropout; padding or position ids; temperature on one side only; another precision or attention in one of "
            "the passes; a model whose cached decoding differs from its full pass"
        )
    if log["eos_rate"] == 0 and task.min_new_tokens < task.max_new_tokens:
        found["alarm_eos"] = (
            "no response of the batch ended by itself. Likely causes: max_new_tokens is too small for an answer; the "
            "model never learned to end (fine-tune it on whole completions); its chat template or ending token is not "
            "the one it was trained with; the policy is rewarded for length (missing_eos_penalty works against that)"
        )
    if not log.get("sampler_gap", 0.0) <= SAMPLER_GAP:
        found["alarm_sampler"] = (
            f"the server's log-probabilities are off by {log['sampler_gap']:.2g} nats per token, more than "
            f"{SAMPLER_GAP:g}: it draws from another distribution than the policy's. Likely causes: it holds other "
            "weights (sampler_update is not set, or failed there); vLLM was started without --logprobs-mode "
            "processed_logprobs, and the task has a temperature or a minimum length; it computes in a low precision, "
            "or quantised; it serves another model"
        )
    for name, message in found.items():
        if not any(name in earlier for earlier in history):
            _log.warning("ALARM, update %d: %s.", len(history) + 1, message)
    return dict.fromkeys(found, 1.0)
