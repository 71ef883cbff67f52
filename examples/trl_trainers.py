"""TRL's GRPO and RLOO on the prompts and the reward model of an environment, which evaluates their policies.

Command: ``python examples/trl_trainers.py`` (``pip install trl==1.16.0``; two minutes).
"""

from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import textenv
from agents.core.agent import LanguageModelAgent
from textenv.evaluation import Evaluation, evaluate
from textenv.integrations.trl import reward_function
from textenv.lm import LanguageModel
from textenv.stats import mean_ci95
from textenv.vector import make_vec

ENV_ID = "textenv/Assistant-v0"
TRAINERS = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}


def train(name: str, folder: str | Path, steps: int) -> LanguageModel:
    """The SFT model of the embedded world, trained by TRL and saved to a folder."""
    start = textenv.fresh_language_model("assistant-sft")
    make_config, make_trainer = TRAINERS[name]
    config = make_config(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=24,
        learning_rate=1e-3,
        beta=0.2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = make_trainer(
        model=start.model,
        args=config,
        reward_funcs=reward_function(ENV_ID),
        train_dataset=Dataset.from_list([{"prompt": text} for text in textenv.prompt_set("assistant-train").prompts]),
        processing_class=start.tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return textenv.fresh_language_model(str(folder))


def answers(policy: LanguageModel) -> Evaluation:
    """What the policy answers to prompts that it was not trained on, and what the environment pays for it."""
    env = make_vec(ENV_ID, 256, prompts="assistant-validation")
    return evaluate(LanguageModelAgent(policy, env.task), env)


def show(name: str, policy: LanguageModel) -> None:
    found = answers(policy)
    mean, ci95 = mean_ci95(found.rewards)
    print(f"{name}: reward {mean:.3f} ± {ci95:.3f}, score {found.rm_scores.mean():.3f}")


if __name__ == "__main__":
    show("SFT", textenv.fresh_language_model("assistant-sft"))
    for name in TRAINERS:
        show(name, train(name, f"runs/trl-{name.lower()}", 60))
