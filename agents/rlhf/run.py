"""RLHF on a pretrained model and people's comparisons of replies: SFT → reward model → PPO, judged from outside.

1. **data**: the comparisons are split by prompt; those whose prompt is too long are left out.
2. **sft**: the model is fine-tuned on the replies that people preferred.
3. **reward_model**: the SFT trunk, frozen, gets a head that learns the comparisons.
4. **ppo**: adapters on the SFT model learn to score high, held near it by the KL.
5. **evaluate**: the pretrained model, SFT and PPO answer held-out prompts. A judge that was not trained on scores the
   replies; perplexity under SFT, distinct words and length show what became of the language.

Every step leaves its result in the run folder; an interrupted run continues where it stopped, with the same result.

Command: ``textenv rlhf --model smollm2-135m --preferences Anthropic/hh-rlhf``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from rich.console import Console

import textenv
from agents.demo.report import write_report
from agents.demo.steps import StepRun, earlier_state, show_loss
from agents.experiments.bounds import OptimumSamples
from agents.ppo import PPO, PPOConfig
from agents.rlhf.data import Parts, prepare, read_rankings, write_parts
from agents.rlhf.measure import evaluate_stages
from agents.sft import SFTConfig, train_sft
from reward_models.preferences import load_rankings
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.data.cards import Card, write_card
from textenv.data.records import write_json
from textenv.lm import load_language_model
from textenv.scoring import score_texts
from textenv.settings import Count, NonNegative, PositiveInt, check_settings
from textenv.training.progress import quiet_libraries
from textenv.vector import TextVectorEnv, make_vec

TITLES = {
    "data": "1 data",
    "sft": "2 supervised fine-tuning",
    "reward_model": "3 reward model",
    "ppo": "4 PPO",
    "evaluate": "5 evaluation on held-out prompts",
}


FROZEN_TRUNK = RewardConfig(
    freeze_trunk=True,
    learning_rate=1e-4,
    weight_decay=1.0,
    batch_size=32,
    epochs=30,
    lr_schedule="constant",
    early_stopping_patience=3,
)
"""For a head on a pretrained trunk and some hundreds of comparisons (benchmarks/human_preferences.py)."""


@dataclass(frozen=True, kw_only=True)
class RLHFConfig:
    """Settings of a run. The defaults fit a model of some 100 M parameters on a few cores."""

    model: str
    """Pretrained language model: a registered name, a folder, a hub id or a .gguf file. One with a chat template is
    trained on chats, any other on the texts as they are."""
    preferences: str
    """People's comparisons of replies, in any layout that `textenv reward` reads: a file, a folder or a hub id."""
    output: Path = Path("runs/rlhf")
    """Where models, data and the report go. A run of the same settings is continued; nothing there is removed."""
    judge: str = '{"rule": "sentiment"}'
    """Reward model that is only measured: a registered name, module:callable, a folder, a hub id or a JSON object. The
    default, VADER's sentiment, needs ``pip install 'textenv[sentiment]'``."""
    optimise: Literal["reward-model", "judge"] = "reward-model"
    """What PPO maximises. "judge" swaps the two: the reward model of the comparisons then judges."""
    seed: Count = 0
    """Seed of the split, the training and the sampling."""
    max_pairs: Annotated[PositiveInt | None, "Use None for all."] = 1_000
    """Comparisons used, drawn at random; None: all. A part of them is held out, and takes its time to evaluate."""
    held_out: Annotated[float, Gt(0), Lt(1), "It is a share."] = 0.15
    """Share of the prompts that are kept for the evaluation."""
    demonstrations: PositiveInt = 256
    """Preferred replies for SFT."""
    max_prompt_tokens: PositiveInt = 128
    """Longest prompt, in tokens of the chat template."""
    max_new_tokens: PositiveInt = 48
    """Length budget of a reply."""
    ppo_updates: PositiveInt = 20
    """PPO updates, of ``ppo.batch_size`` replies each."""
    kl_coef: Annotated[NonNegative, "Use 0 to switch the KL off."] = 0.1
    """β: what a nat of KL costs. Scores of the reward model have standard deviation 1 among replies to one prompt."""
    eval_samples: PositiveInt = 1
    """Replies of each stage to each held-out prompt."""
    optimum_samples: OptimumSamples = 0
    """Replies of SFT to each held-out prompt from which the best objective is estimated for the report; 0: none.
    Fewer than 16 tell little, and it takes as long as so many ``eval_samples``."""
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(learning_rate=2e-5, batch_size=8, max_length=256))
    reward: RewardConfig = FROZEN_TRUNK
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(batch_size=32, epochs=2, minibatches=2, learning_rate=3e-4, lora_rank=16)
    )

    def __post_init__(self) -> None:
        check_settings(self)


def run_rlhf(config: RLHFConfig, console: Console | None = None) -> dict[str, Any]:
    """Run what is not done yet; write ``summary.json`` and ``report.html``; return the summary.

    Raises:
        ValueError: the model, the comparisons or the judge cannot be read, or the folder holds another run.
    """
    quiet_libraries()
    console = console or Console(stderr=True)
    parts = None if "data" in earlier_state(config).get("seconds", {}) else check(config)
    run = StepRun(config, TITLES, console)
    if parts is not None:
        run.step("data", lambda advance: write_parts(parts, run.folder / "data", config.demonstrations))
    run.step("sft", lambda advance: train_demonstrations(run, advance))
    run.step("reward_model", lambda advance: train_rewards(run, advance))
    run.step("ppo", lambda advance: train_ppo(run, advance))
    run.step("evaluate", lambda advance: evaluate_all(run, advance))
    summary = run.finish()
    console.print(f"report: {write_report(run.folder)}")
    return summary


def check(config: RLHFConfig) -> Parts:
    """Whatever would stop the run after an hour stops it now; the comparisons that the model can read."""
    judge = textenv.reward_model(config.judge)
    score_texts(judge, ["Hello"], ["Hello."], {"finish_reason": ["eos"]})
    model = textenv.language_model(config.model)
    width = config.max_prompt_tokens + config.max_new_tokens
    if model.max_tokens is not None and width > model.max_tokens:
        raise ValueError(
            f"max_prompt_tokens + max_new_tokens must fit the context of {config.model!r} ({model.max_tokens}), got "
            f"{width}. Lower one of them."
        )
    return prepare(
        load_rankings(config.preferences, skip_malformed=True),
        model,
        max_prompt_tokens=config.max_prompt_tokens,
        max_pairs=config.max_pairs,
        held_out=config.held_out,
        seed=config.seed,
    )


def train_demonstrations(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """SFT of the pretrained model."""
    config: RLHFConfig = run.config
    records = run.folder / "data" / "demonstrations.jsonl"
    settings = replace(config.sft, seed=config.seed)
    options: dict[str, Any] = {"resume": True, "on_progress": show_loss(advance)}
    return train_sft(config.model, records, settings, run.folder / "sft", **options).history


def train_rewards(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """A reward model on the SFT trunk."""
    config: RLHFConfig = run.config
    settings = replace(config.reward, seed=config.seed)
    if settings.freeze_trunk and settings.feature_file is None:
        settings = replace(settings, feature_file=str(run.folder / "features.sqlite"))
    start = TransformerRewardModel.from_language_model(load_language_model(run.folder / "sft"))
    start.batch_size = 8
    result = train_reward_model(
        start,
        read_rankings(run.folder / "data", "train"),
        settings,
        run.folder / "reward_model",
        eval_rankings=read_rankings(run.folder / "data", "validation"),
        resume=True,
        on_progress=show_loss(advance),
    )
    return result.history


def train_ppo(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """PPO from the SFT model."""
    config: RLHFConfig = run.config
    settings = replace(config.ppo, seed=config.seed)
    env = make_env(run, "train", settings.batch_size)
    agent = PPO.resume(run.folder / "ppo", env, settings)
    agent.learn_with_checkpoints(config.ppo_updates * settings.batch_size, run.folder / "ppo", advance=advance)
    return agent.history


def evaluate_all(run: StepRun, advance: Any) -> None:
    """Measure every stage on held-out prompts; write the summary."""
    config: RLHFConfig = run.config
    summary = evaluate_stages(run.folder, make_env(run, "held-out", 32), config, advance)
    write_cards(run, summary)
    write_json(run.folder / "summary.json", summary | {"config": run.settings})


def write_cards(run: StepRun, summary: Mapping[str, Any]) -> None:
    """A card beside each model, with its settings and what was measured on held-out prompts."""
    config: RLHFConfig = run.config
    data, sft = config.preferences, str(run.folder / "sft")
    figures = {
        stage: {key: value["mean"] if isinstance(value, Mapping) else value for key, value in summary[stage].items()}
        for stage in ("sft", "ppo")
    }
    settings = {step: {**run.settings[step], "seed": config.seed} for step in ("sft", "reward", "ppo")}
    text, scores = "text-generation", "text-classification"
    tuned = Card("supervised fine-tuning", text, config.model, data, settings["sft"], figures["sft"])
    scorer = Card("reward model", scores, sft, data, settings["reward"], summary["reward_model"])
    write_card(run.folder / "sft", tuned)
    write_card(run.folder / "reward_model", scorer)
    policy = Card("PPO", text, sft, data, settings["ppo"], figures["ppo"])
    write_card(run.folder / "ppo", policy, inside="policy")


def make_env(run: StepRun, part: str, num_envs: int) -> TextVectorEnv:
    """The prompts of a part of the data as an environment, with the judge's score as ``gold_score``."""
    config: RLHFConfig = run.config
    trained = str(run.folder / "reward_model")
    swapped = config.optimise == "judge"
    return make_vec(
        "textenv/Text-v0",
        num_envs,
        prompts=str(run.folder / "data" / f"prompts-{part}.jsonl"),
        reference=str(run.folder / "sft"),
        reward_model=config.judge if swapped else trained,
        gold=trained if swapped else config.judge,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        kl_coef=config.kl_coef,
    )
