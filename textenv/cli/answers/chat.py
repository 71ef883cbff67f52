"""``textenv chat``."""

from typing import Any

import tyro

import textenv
from textenv.chat.conversation import Conversation, Judge
from textenv.chat.terminal import talk
from textenv.cli.common import check_device, policy_of
from textenv.config import Loading, Precision
from textenv.registry import environment_spec
from textenv.settings import PositiveInt, check_value
from textenv.task import token_rule


def chat(
    model: tyro.conf.Positional[str],
    *,
    against: str | None = None,
    env_id: str | None = None,
    reference: str | None = None,
    reward_model: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    device: str = "cpu",
    dtype: Precision = "float32",
    attn_implementation: str | None = None,
) -> None:
    """Talk to a model; its tokens appear as they are drawn. Ctrl-C stops an answer, Ctrl-D leaves.

    A model with a chat template hears the whole conversation; any other continues each line on its own. The lines may
    come through a pipe. /tokens shows the score of the last answer and the KL of each of its tokens.

    Args:
        model: a registered name, a folder (also a checkpoint of `ppo`, …) or a hub id.
        against: another model, which answers the same lines after it.
        env_id: take from this environment the reference, the reward model and how tokens are drawn.
        reference: language model that the KL is measured against.
        reward_model: a registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON
            object.
        template: text to continue, with {} for each line, like "user: {} assistant:".
        max_new_tokens: length budget of an answer, tokens; 256 without an environment.
        temperature: sampling temperature; 1 without an environment.
        seed: seed of the sampling; by default another one each time.
        device: where the models run, like cpu or cuda:0.
        dtype: precision of the models.
        attn_implementation: how models compute attention: sdpa, eager, flash_attention_2, ...
    """
    given = {"reference": reference, "reward_model": reward_model, "temperature": temperature}
    given = {name: value for name, value in {**given, "max_new_tokens": max_new_tokens}.items() if value is not None}
    options: dict[str, Any] = {**({} if env_id is None else environment_spec(env_id).kwargs), **given}
    budget = options.get("max_new_tokens", 256)
    check_value("max_new_tokens", budget, PositiveInt)
    check_device(device)
    loading = Loading(device, dtype, attn_implementation)
    judge = Judge(
        textenv.language_model(policy_of(options["reference"]), *loading) if options.get("reference") else None,
        textenv.reward_model(options["reward_model"], *loading) if options.get("reward_model") else None,
    )
    drawn = {name: options[name] for name in ("temperature", "min_new_tokens", "stop_tokens") if name in options}
    speakers = {}
    for name in [model] if against is None else [model, against]:
        speaker = textenv.language_model(policy_of(name), *loading)
        judge.check(speaker)
        rule = token_rule(speaker, **drawn)
        speakers[name] = Conversation(speaker, rule, max_new_tokens=budget, template=template, seed=seed)
    talk(speakers, judge)
