"""TRL's side: stock ``trl.experimental.ppo``, in an environment of its own (``make trl``).

``per_device_train_batch_size`` is the whole batch: with gradient accumulation, TRL 1.12 takes one optimiser step per
accumulated batch and not one per minibatch.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

from benchmarks.ppo_speed.talk import answers, asked, now, peak_rss_mb, phases, told


class Clock(TrainerCallback):
    """Waits before each iteration until it is wanted, and answers after it."""

    def __init__(self, prompt_tokens: int) -> None:
        self.say, self.prompt_tokens, self.prompt_width = answers(), prompt_tokens, 0
        self.start = self.collected = now()
        self.mask = torch.zeros(1, 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = phases(self.start, self.collected, now())
        episodes, width = self.mask.shape
        response_tokens = int(self.mask.sum())
        passed = self.prompt_width * episodes + episodes * width
        tokens = {"response_tokens": response_tokens, "tokens": response_tokens + self.prompt_tokens}
        self.say({**seconds, **tokens, "padding": 1 - tokens["tokens"] / passed, "peak_rss_mb": peak_rss_mb()})
        self.wait()

    def wait(self) -> None:
        if not asked():
            raise SystemExit
        self.start = now()

    def watch(self, prompt_width: int) -> None:
        """Advantages are whitened once an iteration, at the end of what we call collecting."""
        self.prompt_width = prompt_width
        whiten = ppo_trainer.masked_whiten

        def noted(values: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.mask = mask
            result = whiten(values, mask, **kwargs)
            self.collected = now()
            return result

        ppo_trainer.masked_whiten = noted


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(spec["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(spec["reference"], padding_side="left")
    tokenizer.pad_token = spec["pad_token"]  # TRL takes every token that looks like padding for padding

    def classifier() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(spec["reward"], dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def language_model() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(spec["reference"], dtype=torch.float32)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    ids = [tokenizer(prompt, add_special_tokens=True).input_ids for prompt in spec["prompts"]]
    clock = Clock(sum(map(len, ids)))
    clock.watch(max(map(len, ids)))
    batch = spec["batch"]
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_ppo_epochs=spec["epochs"],
            num_mini_batches=spec["minibatches"],
            local_rollout_forward_batch_size=batch,
            total_episodes=10_000 * batch,
            response_length=spec["response"],
            stop_token_id=tokenizer.convert_tokens_to_ids(spec["stop"]) if spec["stop"] else None,
            temperature=1.0,
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
        )
        PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=language_model(),
            ref_model=language_model(),
            reward_model=classifier(),
            value_model=classifier(),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            callbacks=[clock],
        ).train()


if __name__ == "__main__":
    main(told())
