"""The word-level tokenizer of the world. It needs transformers; the rest of the world does not."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textenv.tasks.assistant.phrases import VOCABULARY


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token. Padding *is* EOS (id 0), on purpose: nothing may tell them apart by id. There is no BOS."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
