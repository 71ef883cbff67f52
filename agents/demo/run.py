"""The three steps of RLHF on the embedded world, from nothing: SFT → reward model → PPO, each measured.

1. **base**: a small GPT-2 learns a mixed corpus (good, wrong, rude, complying, rambling answers).
2. **sft**: it is fine-tuned on a few demonstrations.
3. **rankings**: the SFT model answers each prompt K times; simulated annotators rank the answers.
4. **reward_model**: a copy of the SFT trunk with a scalar head learns the rankings.
5. **ppo**: PPO optimises the reward model's score, held near the SFT model by the KL.
6. **evaluate**: base, SFT, best-of-K and PPO answer held-out prompts; a gold judge, never trained on, scores.

Every step leaves its result in the run folder; an interrupted run continues where it stopped, with the same result.

Command: ``textenv demo``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from agents.core.agent import LanguageModelAgent
from agents.demo.judge import assistant_env, evaluate_stages, gold_of
from agents.demo.report import write_report
from agents.demo.steps import StepRun, show_loss
from agents.ppo import PPO, PPOConfig
from agents.presets import preset
from agents.sft import SFTConfig, train_sft
from reward_models.feedback import check_extra
from reward_models.preferences import load_rankings
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.data.records import write_json, write_jsonl
from textenv.evaluation import evaluate
from textenv.lm import LanguageModel, load_language_model
from textenv.lm.load import wrap_language_model
from textenv.settings import Count, NonNegative, PositiveInt, check_settings
from textenv.tasks import assistant
from textenv.training.progress import quiet_libraries

HELD_OUT_ANNOTATORS = 4
"""Rankings of the same held-out answers: more labels, less noise in the accuracy; intervals are clustered by prompt."""

TITLES = {
    "base": "1 base model",
    "sft": "2 supervised fine-tuning",
    "rankings": "3 annotators rank answers",
    "reward_model": "4 reward model",
    "ppo": "5 PPO",
    "evaluate": "6 evaluation on held-out prompts",
}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo. The defaults were chosen on validation prompts."""

    output: Path = Path("runs/demo")
    """Where models, data and the report go. A run of the same settings is continued; nothing there is removed."""
    seed: Count = 0
    """Seed of the initial weights, the data, the annotators and the sampling."""
    base_examples: PositiveInt = 40_000
    """Texts of the base corpus."""
    demonstrations: PositiveInt = 600
    """Demonstrations for SFT: few, so that it leaves head-room."""
    rankings: PositiveInt = 8_000
    """Rankings to train the reward model on. The 2,000 training prompts are gone through in turn, each time with new
    answers."""
    human: Count = 0
    """Prompts whose answers a person ranks in a browser, in the place of the simulated annotators; 0: none. Needs
    ``pip install 'textenv[feedback]'``."""
    responses_per_prompt: Annotated[int, Ge(2), "A ranking needs two answers."] = 4
    """K: answers ranked together; also the n of best-of-n."""
    ppo_updates: PositiveInt = 120
    """PPO updates, of ``ppo.batch_size`` episodes each."""
    kl_coef: Annotated[NonNegative, "Use 0 to switch the KL off."] = 0.2
    """β: what a nat of KL costs, in units of the reward model's spread within a prompt."""
    eval_split: Literal["validation", "test"] = "test"
    """Held-out prompts: "validation" to choose settings, "test" to report."""
    eval_prompts: Annotated[Annotated[int, Ge(1), Le(512)] | None, "There are 512; use None for all."] = None
    """How many of them are answered, from the first on; None: all 512."""
    base: SFTConfig = field(
        default_factory=lambda: SFTConfig(learning_rate=3e-3, epochs=3, batch_size=32, completion_only=False)
    )
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(learning_rate=1e-3, epochs=2, batch_size=32))
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(
            learning_rate=1e-3, epochs=3, batch_size=16, freeze_embeddings=True, loss="listwise"
        )
    )
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(**preset("assistant", "ppo", total_episodes=120 * 256)))

    def __post_init__(self) -> None:
        check_settings(self)


def smoke_config(config: DemoConfig) -> DemoConfig:
    """The same run with so little of everything that it only shows that every step works."""
    return replace(
        config,
        base_examples=192,
        demonstrations=48,
        rankings=48,
        responses_per_prompt=4,
        eval_prompts=64,
        ppo_updates=2,
        base=SFTConfig(learning_rate=3e-3, epochs=1, batch_size=64, completion_only=False),
        sft=SFTConfig(learning_rate=1e-3, epochs=1, batch_size=16),
        reward=RewardConfig(learning_rate=1e-3, epochs=1, batch_size=16),
        ppo=PPOConfig(batch_size=32, epochs=1, minibatches=2),
    )


def run_demo(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Run what is not done yet; write ``summary.json`` and ``report.html``; return the summary."""
    quiet_libraries()
    if config.human:
        check_extra()
    console = console or Console(stderr=True)
    run = StepRun(config, TITLES, console)
    run.step("base", lambda advance: train_base(run, advance))
    run.step("sft", lambda advance: train_demonstrations(run, advance))
    run.step("rankings", lambda advance: collect_rankings(run, advance))
    run.step("reward_model", lambda advance: train_rewards(run, advance))
    run.step("ppo", lambda advance: train_ppo(run, advance))
    run.step("evaluate", lambda advance: evaluate_all(run, advance))
    summary = run.finish()
    report = write_report(run.folder)
    console.print(f"report: {report}")
    return summary


def new_base_model(seed: int) -> LanguageModel:
    """An untrained GPT-2 of about 0.17 M parameters over the world's vocabulary."""
    tokenizer: Any = assistant.build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=48,
        n_embd=64,
        n_layer=3,
        n_head=4,
        initializer_range=0.08,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one fused kernel
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap_language_model(GPT2LMHeadModel(config), tokenizer, name="base")


def train_base(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """A base model from scratch on the mixed corpus, prompts included."""
    config = run.config
    corpus = assistant.sample_corpus(config.base_examples, config.seed, source="base")
    settings = replace(config.base, seed=config.seed)
    model = new_base_model(config.seed)
    return train_sft(model, corpus, settings, run.folder / "base", resume=True, on_progress=show_loss(advance)).history


def train_demonstrations(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """SFT of the base model."""
    config = run.config
    records = assistant.sample_corpus(config.demonstrations, config.seed + 1, source="demonstrations")
    write_jsonl(run.folder / "data" / "demonstrations.jsonl", records)
    base = load_language_model(run.folder / "base")
    settings = replace(config.sft, seed=config.seed)
    return train_sft(base, records, settings, run.folder / "sft", resume=True, on_progress=show_loss(advance)).history


def collect_rankings(run: StepRun, advance: Any) -> None:
    """K answers of the SFT model a prompt, ranked by simulated annotators or a person: to train on, and held out to
    measure."""
    config = run.config
    counts = {"train": config.human or config.rankings, config.eval_split: config.eval_prompts}
    for part, (split, count) in enumerate(counts.items()):
        env = assistant_env(split, reference=str(run.folder / "sft"), reward_model="assistant-gold")
        agent = LanguageModelAgent(load_language_model(run.folder / "sft"), env.task, seed=config.seed + 10 + part)
        available = len(env.task.prompts.ids)
        ids = np.arange(count or available) % available
        samples = []
        for k in range(config.responses_per_prompt):
            samples.append(evaluate(agent, env, prompt_ids=ids))
            advance(part * config.responses_per_prompt + k + 1, 2 * config.responses_per_prompt, {})
        answers = list(zip(*(s.responses for s in samples), strict=True))
        reasons = list(zip(*(s.finish_reasons for s in samples), strict=True))
        if split == "train" and config.human:
            from agents.demo.human import people_rank

            rows = people_rank(run.folder / "human.db", samples[0].prompts, answers, reasons, run.console, advance)
            write_jsonl(run.folder / "data" / "rankings-train.jsonl", rows)
            continue
        gold = np.stack([gold_of(s) for s in samples], axis=1).tolist()
        rows = []
        for annotator in range(1 if split == "train" else HELD_OUT_ANNOTATORS):
            seed = config.seed + 1_000 * (2 * annotator + part + 1)
            records = assistant.sample_rankings(samples[0].prompts, answers, seed, finish_reasons=reasons)
            # Equal answers to one prompt teach nothing and would count as half-right pairs: keep each answer once.
            rows += [distinct(record, scores) for record, scores in zip(records, gold, strict=True)]
        rows = [row for row in rows if len(row["responses"]) > 1]
        write_jsonl(run.folder / "data" / f"rankings-{'train' if split == 'train' else 'held-out'}.jsonl", rows)


def distinct(record: Mapping[str, Any], gold: list[float]) -> dict[str, Any]:
    """A ranking with equal responses merged (the better rank stays), and the gold score of each response."""
    kept = list(dict.fromkeys(record["responses"]))
    order = dict.fromkeys(record["responses"][i] for i in record["ranking"])
    scores = dict(zip(record["responses"], gold, strict=True))
    return {
        "prompt": record["prompt"],
        "responses": kept,
        "ranking": [kept.index(response) for response in order],
        "gold": [scores[response] for response in kept],
    }


def train_rewards(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """A reward model from the SFT trunk and the rankings."""
    config = run.config
    rankings = load_rankings(run.folder / "data" / "rankings-train.jsonl")
    ties = any(ranking.has_ties for ranking in rankings)  # a person may give some
    result = train_reward_model(
        load_language_model(run.folder / "sft"),
        rankings,
        replace(config.reward, seed=config.seed, loss="pairwise" if ties else config.reward.loss),
        run.folder / "reward_model",
        resume=True,
        on_progress=show_loss(advance),
    )
    return result.history


def train_ppo(run: StepRun, advance: Any) -> list[dict[str, float]]:
    """PPO from the SFT model against the reward model."""
    config = run.config
    settings = replace(config.ppo, seed=config.seed)
    env = assistant_env(
        "train",
        reference=str(run.folder / "sft"),
        reward_model=str(run.folder / "reward_model"),
        kl_coef=config.kl_coef,
        num_envs=settings.batch_size,
    )
    folder = run.folder / "ppo"
    agent = PPO.resume(folder, env, settings)
    agent.learn_with_checkpoints(config.ppo_updates * settings.batch_size, folder, advance=advance)
    return agent.history


def evaluate_all(run: StepRun, advance: Any) -> None:
    """Measure every stage on held-out prompts; write the summary."""
    config = run.config
    summary = evaluate_stages(
        run.folder,
        advance,
        split=config.eval_split,
        prompts=config.eval_prompts,
        kl_coef=config.kl_coef,
        repeats=config.responses_per_prompt,
        seed=config.seed,
    )
    summary["seed"] = config.seed
    summary["eval_split"] = config.eval_split
    summary["versions"] = {name: version(name) for name in ("torch", "transformers", "gymnasium", "numpy")}
    summary["config"] = run.settings
    write_json(run.folder / "summary.json", summary)
