"""Low-rank adapters (Hu et al. 2021) while training, merged into the weights afterwards; needs ``peft``."""

from transformers import PreTrainedModel

from reward_models.scorers.heads import score_head
from textenv.lm.adapters import add_adapters


class LoRA:
    """Adapters on every linear layer of a reward model but its last, which trains as it is.

    The model itself is changed in place (:func:`textenv.lm.adapters.add_adapters`), and stays a Hugging Face model
    without adapters once :meth:`merge` has run.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, seed: int) -> None:
        head = score_head(model)
        self._tuner = add_adapters(model, rank=rank, alpha=alpha, seed=seed, leave=head)
        head.requires_grad_(True)

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt, and take them away; all weights can be trained again."""
        model = self._tuner.merge_and_unload()
        model.requires_grad_(True)
