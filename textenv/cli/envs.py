"""``textenv envs``."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from textenv.registry import environment_spec, vocabulary_size

Json = Annotated[bool, tyro.conf.arg(name="json", help="print the full specs, a JSON object a line.")]


def envs(*, experiment: Path | None = None, load: bool = False, as_json: Json = False) -> None:
    """List the registered environments.

    Args:
        experiment: list those of this experiment file too.
        load: load the references, to show the tokens that end a turn and every vocabulary.
    """
    if experiment is not None:
        textenv.load_experiment(experiment).register()
    if as_json:
        for env_id in textenv.registered_ids():
            print(environment_spec(env_id).to_json())
        return
    console = Console(highlight=False)
    for env_id, description in textenv.registered_ids().items():
        kwargs = environment_spec(env_id).kwargs
        tokens, problem = _vocabulary(kwargs["reference"], load)
        budget = f"{kwargs['max_prompt_tokens']} + {kwargs['max_new_tokens']}"
        figures = f"vocabulary {tokens}, prompt + response ≤ {budget} tokens, β {kwargs.get('kl_coef', 0.05):g}"
        names = [f"{key.replace('_', ' ')} {_short(kwargs[key])}" for key in ("prompts", "reference", "reward_model")]
        console.print(f"[bold]{escape(env_id)}[/]  {escape(description)}")
        console.print(escape(f"{figures}; {', '.join(names)}"), style="dim")
        if load and kwargs["reference"] is not None and not problem:
            model = textenv.language_model(kwargs["reference"])
            ends = model.tokenizer.convert_ids_to_tokens(list(model.ending_ids))
            console.print(escape(f"a turn ends at {' or '.join(ends)}"), style="dim")
        if problem:
            console.print(escape(f"? {problem}"), style="yellow")


def _short(source: Any) -> str:
    """A name or path as one word; "yours" where the id leaves it open."""
    if isinstance(source, list | tuple):
        return f"{len(source)} inline"
    source = str(source.get("dataset", next(iter(source.values())))) if isinstance(source, dict) else source
    return "yours" if source is None else Path(source).name if source.startswith(("/", ".")) else source


def _vocabulary(reference: str | None, load: bool) -> tuple[str, str]:
    """Number of actions on a reference, and what is wrong when it is not known."""
    if reference is None:
        return "yours", ""
    if load:
        from textenv.training.progress import quiet_libraries

        quiet_libraries()
    try:
        size = vocabulary_size(reference, load=load)
    except ValueError as error:
        return "?", str(error)
    return ("?", "only loading the reference tells its vocabulary: --load") if size is None else (str(size), "")
