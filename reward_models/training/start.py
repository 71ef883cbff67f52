"""Models that the training of a reward model can start from, by name."""

from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import textenv
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from textenv.data.hub import hub_or_cache
from textenv.lm.adapters import adapter_base, merged_copy
from textenv.lm.load import is_gguf
from textenv.registry import registered_sources


def start_reward_model(name: str, device: str = "cpu") -> TransformerRewardModel:
    """A model to train, that nobody else holds. ``name`` is one of

    * a causal language model (registered name, folder, hub id or .gguf file), whose trunk gets a head of zeros;
    * a pre-trained encoder (folder or hub id: BERT, DeBERTa, …), likewise;
    * a reward model (registered name, folder or hub id), to train further; the adapters of one that ``peft`` saved are
      added to its weights.

    Raises:
        ValueError: it is none of them.
    """
    source = registered_sources("reward model").get(name)
    if isinstance(source, str | Path):
        name = str(source)
    if adapter_base(name) is not None:
        loaded = load_reward_model(name, device)
        return TransformerRewardModel(merged_copy(loaded.model), loaded.tokenizer, name=name)
    if is_gguf(name) or ("/" not in name and not Path(name).exists()):
        return TransformerRewardModel.from_language_model(textenv.fresh_language_model(name, device))
    with hub_or_cache(name) as unreachable:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            rule = "a reward model must start from a registered name, a folder or a hub id"
            raise ValueError(f"{rule}, got {name!r}: {error}{unreachable} Check the name.") from error
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return load_reward_model(name, device)
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        return TransformerRewardModel.from_encoder(name, device=device)
    return TransformerRewardModel.from_language_model(textenv.fresh_language_model(name, device))
