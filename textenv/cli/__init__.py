"""The ``textenv`` command: every part of the package from a shell.

A command is a function: its flags are its parameters, and ``--help`` prints their documentation. Each is defined inside
a function of its own that first imports what the command needs, so that ``textenv --help`` answers at once.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gymnasium

from textenv import __version__
from textenv.cli.envs import check_command, envs_command
from textenv.data.folders import check_replaceable, check_writable


def _learners() -> dict[str, str]:
    """Each learner of ``agents`` with what it is, in a line."""
    from agents.algorithms import LEARNERS, summary  # light: imports no algorithm

    return {name: summary(name) for name in LEARNERS}


LEARNERS = _learners()
USAGE = f"""usage: textenv COMMAND [--help | OPTIONS]
       textenv --version

RLHF as ordinary reinforcement learning.

  envs      list the registered environments
  check     check that an environment keeps the contract
  sft       fine-tune a language model on demonstrations
  reward    train a reward model on rankings
  rm-bench  benchmark reward models on preferences, with a report
  serve-rm  serve a reward model over HTTP
  evaluate  answer an environment's prompts and score the answers
  run       an experiment file: agents × environments × seeds, compared
  demo      all three steps on the embedded world, with a report

Train a policy in an environment by:
{"".join(f"  {name:<9} {text}{chr(10)}" for name, text in LEARNERS.items())}
`textenv COMMAND --help` explains a command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvArgs:
    """Which environment, and what to change in it. What is not given stays as the id defines it."""

    env_id: str = "textenv/Assistant-v0"
    """A registered id (`textenv envs` lists them). `textenv/Text-v0` takes your prompts, reference, reward model."""
    prompts: str | None = None
    """Prompt set: a registered name or a JSONL file of strings under "prompt"."""
    reference: str | None = None
    """Language model that the KL is measured against: a registered name, a folder or a hub id."""
    reward_model: str | None = None
    """A registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON object."""
    kl_coef: float | None = None
    """Reward paid for each nat of KL."""
    max_prompt_tokens: int | None = None
    """Width of the prompt, tokens."""
    max_new_tokens: int | None = None
    """Length budget of a response, tokens."""
    temperature: float | None = None
    """Sampling temperature of the policy and the reference alike."""
    missing_eos_penalty: float | None = None
    """Subtracted when a response spends its budget without ending."""
    device: str | None = None
    """Where the models run, like cpu or cuda:0."""

    def make(self, num_envs: int) -> Any:
        from textenv.vector import make_vec

        check_at_least(1, num_envs=num_envs)
        check_device(self.device or "cpu")
        options = dataclasses.asdict(self)
        env_id = options.pop("env_id")
        given = {name: value for name, value in options.items() if value is not None}
        return make_vec(env_id, num_envs, **given)


def sft_command() -> Callable[..., None]:
    import tyro

    from agents.sft import SFTConfig, train_sft
    from textenv.training.progress import progress_bar

    def sft(
        model: str,
        data: Path,
        output: Path,
        config: Annotated[SFTConfig, tyro.conf.arg(name="")],
        *,
        eval_data: Path | None = None,
        resume: bool = False,
    ) -> None:
        """Fine-tune a language model on demonstrations; the result is a Hugging Face folder.

        Args:
            model: where to start: a registered name, a folder or a hub id.
            data: JSONL of {"prompt", "completion"} or {"messages"} records.
            output: folder for the result; an interrupted run leaves its checkpoint there.
            config: how to train.
            eval_data: held-out records; their NLL is printed at the end.
            resume: continue the interrupted run in the output folder.
        """

        _refuse_finished(output)
        with progress_bar("supervised fine-tuning") as advance:
            result = train_sft(
                model, data, config, output, eval_records=eval_data, resume=resume, on_progress=_on_progress(advance)
            )
        _print({**result.metrics, "output": str(output)})

    return sft


def reward_command() -> Callable[..., None]:
    import tyro

    from reward_models.preferences import load_rankings
    from reward_models.training.start import start_reward_model
    from reward_models.training.trainer import RewardConfig, train_reward_model
    from textenv.training.progress import progress_bar

    def reward(
        model: str,
        data: str,
        output: Path,
        config: Annotated[RewardConfig, tyro.conf.arg(name="")],
        *,
        eval_data: str | None = None,
        split: str | None = None,
        eval_split: str | None = None,
        resume: bool = False,
        skip_malformed: bool = False,
    ) -> None:
        """Train a reward model on rankings or pairs; the result is a Hugging Face sequence-classification folder.

        Args:
            model: language model or encoder that lends its trunk, or a reward model to train on: a registered name, a
                folder or a hub id.
            data: JSONL (.gz too), data set folder or hub id, of {"prompt", "responses", "ranking"} or {"prompt",
                "chosen", "rejected"} records, or of {"chosen", "rejected"} dialogues.
            output: folder for the result; an interrupted run leaves its checkpoint there.
            config: how to train.
            eval_data: held-out records; accuracy and NLL are printed at the end.
            split: of a data set that has several; default "train".
            eval_split: of the held-out data set.
            resume: continue the interrupted run in the output folder.
            skip_malformed: leave malformed records out, and say how many, instead of stopping at the first.
        """

        _refuse_finished(output)
        rankings = load_rankings(data, split=split, skip_malformed=skip_malformed)
        held_out = None
        if eval_data is not None:
            held_out = load_rankings(eval_data, split=eval_split, skip_malformed=skip_malformed)
        start = start_reward_model(model)
        with progress_bar("reward model") as advance:
            progress = _on_progress(advance)
            result = train_reward_model(
                start, rankings, config, output, eval_rankings=held_out, resume=resume, on_progress=progress
            )
        _print({**result.metrics, "output": str(output)})

    return reward


def serve_command() -> Callable[..., None]:
    import os
    import secrets

    import tyro

    import textenv
    from reward_models.serve import RewardServer

    def serve(
        model: tyro.conf.Positional[str],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        device: str = "cpu",
        token_variable: str | None = None,
    ) -> None:
        """Serve a reward model over HTTP until Ctrl-C. Clients name it by the JSON object that is printed.

        Args:
            model: a registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON object.
            host: address to listen at; any but this machine's own needs a token.
            port: to listen at; 0 takes a free one.
            device: where the model runs.
            token_variable: environment variable with the bearer token that clients must send; None makes one up.
        """

        check_device(device)
        token = secrets.token_urlsafe() if token_variable is None else os.environ.get(token_variable)
        if not token:
            raise ValueError(
                f"token_variable must name an environment variable that is set, got {token_variable!r}. "
                "Export a token there."
            )
        with RewardServer(textenv.reward_model(model, device), host=host, port=port, token=token) as server:
            if token_variable is None:
                token_variable = "TEXTENV_RM_TOKEN"
                print(f"export {token_variable}={token}", flush=True)
            spec = json.dumps({"http": server.url, "token_variable": token_variable})
            print(f"{model} answers; its name elsewhere is {spec}", flush=True)
            server.serve_forever()

    return serve


def learner_command(name: str) -> Callable[..., None]:
    """The command of one of :data:`agents.algorithms.LEARNERS`; the flags are those of its config."""
    import tyro

    from agents.algorithms import algorithm
    from textenv.training.progress import progress_bar

    learner = algorithm(name)

    def train(
        output: Path,
        env: Annotated[EnvArgs, tyro.conf.arg(name="")],
        config: Annotated[learner.config_type, tyro.conf.arg(name="")],
        *,
        total_episodes: int = 15_360,
        num_envs: int = 256,
        save_every: int = 10,
        resume: bool = False,
    ) -> None:
        """Train a policy in an environment; the result is a checkpoint with a Hugging Face model in it.

        ALGORITHM

        Args:
            output: folder for the checkpoint. Ctrl-C finishes the update and saves; --resume continues from there.
            env: the environment.
            config: how to train.
            total_episodes: episodes to play in total, those before a resume included.
            num_envs: episodes played at once; it must divide batch-size and be a multiple of group-size.
            save_every: updates between checkpoints.
            resume: continue from the checkpoint in the output folder.
        """

        check_at_least(1, total_episodes=total_episodes, save_every=save_every)
        check_replaceable(output)
        if not resume and (output / "state.json").exists():
            raise ValueError(
                f"output must be a folder without a checkpoint, got {str(output)!r}. Continue it with --resume, or "
                "name another folder."
            )
        vector = env.make(num_envs)
        agent = learner.load(output, vector) if resume else learner(vector, config)
        with progress_bar(learner.__name__) as advance:
            agent.learn_with_checkpoints(total_episodes, output, every=save_every, advance=advance)
        _print({**agent.history[-1], "output": str(output)})

    train.__doc__ = str(train.__doc__).replace("ALGORITHM", str(learner.__doc__))
    return train


def rm_bench_command() -> Callable[..., None]:
    import tyro

    from reward_models.benchmark import BenchmarkConfig
    from reward_models.benchmark.bench import run_all
    from textenv.training.progress import progress_bar

    def rm_bench(
        models: tyro.conf.Positional[tuple[str, ...]],
        config: Annotated[BenchmarkConfig, tyro.conf.arg(name="")],
        *,
        data: str = "embedded",
        output: Path = Path("runs/rm-bench"),
        compare: bool = False,
    ) -> None:
        """Benchmark reward models: accuracy, calibration, bias, robustness, best-of-n, speed; JSON, a table and a page.

        Args:
            models: registered names, module:callable, or folders or hub ids of sequence classifiers.
            config: what to measure.
            data: embedded, embedded-validation, micro, or JSONL (.gz too) of {"prompt", "responses", "ranking"},
                {"prompt", "chosen", "rejected"} or {"chosen", "rejected"} dialogues.
            output: folder for report.html, table.md and one JSON per model; files of those names are replaced.
            compare: test every model against the first one, pair by pair.
        """

        check_writable(output)
        with progress_bar("benchmark") as advance:
            table = run_all(models, data, output, config, compare_to_first=compare, advance=advance)
        print(table)
        print(f"report: {output / 'report.html'}", file=sys.stderr)

    return rm_bench


def evaluate_command() -> Callable[..., None]:
    import tyro

    import textenv
    from agents.best_of_n import best_responses
    from agents.core.agent import LanguageModelAgent
    from reward_models.benchmark.measures.best_of_n import kl_bound
    from textenv.data.records import write_jsonl
    from textenv.evaluation import evaluate as run
    from textenv.training.progress import progress_bar

    def evaluate(
        model: str,
        env: Annotated[EnvArgs, tyro.conf.arg(name="")],
        *,
        best_of: int = 1,
        deterministic: bool = False,
        num_envs: int = 128,
        seed: int = 0,
        output: Path | None = None,
    ) -> None:
        """Answer every prompt of an environment and score the answers: means with 95 % intervals.

        Args:
            model: language model that answers: a registered name, a folder (also a checkpoint of `ppo`, …) or a hub id.
            env: the environment.
            best_of: draw this many answers per prompt and keep the one with the highest reward-model score.
            deterministic: take the most likely token instead of sampling.
            num_envs: prompts answered at once.
            seed: seed of the sampling.
            output: write prompts, answers and scores to this JSONL file.
        """

        check_at_least(1, best_of=best_of)
        if output is not None:
            check_writable(output.parent)
            if output.is_dir():
                raise ValueError(f"output must be a file, got the folder {str(output)!r}. Name a file in it.")
        vector = env.make(num_envs)
        folder = Path(model) / "policy"
        policy = textenv.fresh_language_model(str(folder) if folder.is_dir() else model, vector.task.config.device)
        agent = LanguageModelAgent(policy, vector.task, seed=seed)
        samples = []
        with progress_bar("evaluation") as advance:
            for k in range(best_of):
                samples.append(run(agent, vector, deterministic=deterministic))
                advance(k + 1, best_of)
        result = best_responses(samples) if best_of > 1 else samples[0]
        if output is not None:
            names = ("prompts", "responses", "rm_scores", "rewards", "finish_reasons")
            columns = [list(getattr(result, name)) for name in names]
            write_jsonl(output, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])
        _print(result.summary() | ({"kl_bound": kl_bound(best_of)} if best_of > 1 else {}))

    return evaluate


def run_command() -> Callable[..., None]:
    import tyro

    from agents.experiments.page import write_summary
    from agents.experiments.run import cells_of, print_tables, run_experiment, summarise
    from textenv.registry.experiment import load_experiment

    def run(experiment: tyro.conf.Positional[Path]) -> None:
        """Run an experiment file: every agent in every environment with every seed, compared at the end.

        Finished parts are not run again. Ctrl-C finishes the update and saves; the same command continues from there.

        Args:
            experiment: YAML file (docs/experiments.md) with a section "run".
        """

        loaded = load_experiment(experiment)
        if loaded.run is None:
            raise ValueError(f"an experiment must have the section 'run', got {str(experiment)!r} without one. Add it.")
        check_writable(loaded.run.output)
        loaded.register()
        results = run_experiment(cells_of(loaded.run, loaded.agents), loaded.run.output)
        page = write_summary(results, loaded.run.output)
        print_tables(summarise(results))
        print(f"summary: {page}")

    return run


def demo_command() -> Callable[..., None]:
    import tyro

    from agents.demo.run import DemoConfig, run_demo

    def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
        """Base model → SFT → rankings → reward model → PPO on the embedded world, from nothing, with a report.

        A few minutes on two cores. Ctrl-C leaves a state that the same command continues.

        Args:
            config: what to run.
        """

        run_demo(config)

    return demo


COMMANDS = {
    "envs": envs_command,
    "check": check_command,
    "sft": sft_command,
    "reward": reward_command,
    "rm-bench": rm_bench_command,
    **{name: partial(learner_command, name) for name in LEARNERS},
    "serve-rm": serve_command,
    "evaluate": evaluate_command,
    "run": run_command,
    "demo": demo_command,
}


_AFTER_STOP = {
    **dict.fromkeys(("sft", "reward", *LEARNERS), "The same command with --resume continues from here."),
    **dict.fromkeys(("run", "demo"), "The same command continues from here."),
    "rm-bench": "The reports of finished models are in the output folder.",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that a user can fix are one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"textenv {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        print(USAGE)
        known = bool(arguments) and arguments[0] in ("-h", "--help")
        if arguments and not known:
            print(f"\ntextenv: command must be one of the above, got {arguments[0]!r}.", file=sys.stderr)
        return 0 if known else 2
    name, rest = arguments[0], arguments[1:]
    if "" not in sys.path:
        sys.path.append("")  # module:callable may name a module of the folder where the command is called
    try:
        import tyro

        command = COMMANDS[name]()
        if name != "envs":
            from textenv.training.progress import quiet_libraries

            quiet_libraries()
        code = tyro.cli(command, args=rest, prog=f"textenv {name}")
    except KeyboardInterrupt:
        print(f"\nstopped. {_AFTER_STOP.get(name, '')}".rstrip(), file=sys.stderr)
        return 130
    except (ValueError, OSError, gymnasium.error.Error) as error:
        print(f"textenv {name}: {error}", file=sys.stderr)
        return 2
    return code or 0


def check_at_least(low: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < low:
            raise ValueError(f"{name} must be {low} or more, got {value}. Raise it.")


def check_device(name: str) -> None:
    """Refuse a device that torch cannot compute on here, before any model is loaded."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"device must be one that torch can use here, got {name!r}. Use cpu.") from error


def _refuse_finished(output: Path) -> None:
    """Refuse a folder that cannot be written, or holds a model that training has finished."""
    check_writable(output)
    if (output / "config.json").is_file() and not list(output.glob("checkpoint-*")):
        raise ValueError(f"output must hold no finished model, got {str(output)!r}. Remove it, or name another folder.")


def _on_progress(advance: Any) -> Callable[..., None]:
    def report(done: int, total: int, metrics: dict[str, float]) -> None:
        advance(done, total, {"loss": metrics["loss"]} if "loss" in metrics else None)

    return report


def _print(values: dict[str, Any]) -> None:
    """Figures as one JSON object on standard output: for people and for scripts."""
    plain = {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in values.items()}
    print(json.dumps(plain, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
