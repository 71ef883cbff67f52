"""Language models: loading, the one padding rule, log-probabilities, cached decoding and scalar heads.

Everything that turns tokens into numbers passes through here, so that the distribution that is sampled is the
distribution that is scored, and padding is decided in one place (:mod:`textenv.lm.batch`).
"""

from textenv.lm.batch import Responses, Rows, length_buckets, pad_left, pad_right, rows
from textenv.lm.distribution import TokenRule
from textenv.lm.heads import ScalarHead, ValueHead
from textenv.lm.load import LanguageModel, disable_dropout, load_language_model
from textenv.lm.logprobs import gather_predictions, response_logprobs, response_outputs, response_scores
from textenv.lm.sample import Sampled, sample_responses

__all__ = [
    "LanguageModel",
    "Responses",
    "Rows",
    "Sampled",
    "ScalarHead",
    "TokenRule",
    "ValueHead",
    "disable_dropout",
    "gather_predictions",
    "length_buckets",
    "load_language_model",
    "pad_left",
    "pad_right",
    "response_logprobs",
    "response_outputs",
    "response_scores",
    "rows",
    "sample_responses",
]
