"""Preferences of people or simulated annotators: one record, :class:`Ranking`, and the readers of all their layouts."""

from reward_models.preferences.dialogues import (
    ASSISTANT,
    HUMAN,
    Turns,
    as_messages,
    beside_prompt,
    of_several_turns,
    split_dialogue,
    split_messages,
)
from reward_models.preferences.layouts import LAYOUTS, Layout, layout_list, layout_table
from reward_models.preferences.ranking import Ranking, better_pairs, prompt_key, split_by_prompt
from reward_models.preferences.read import MalformedRecord, load_rankings, ranking_of, read_rankings

__all__ = [
    "ASSISTANT",
    "HUMAN",
    "LAYOUTS",
    "Layout",
    "MalformedRecord",
    "Ranking",
    "Turns",
    "as_messages",
    "beside_prompt",
    "better_pairs",
    "layout_list",
    "layout_table",
    "load_rankings",
    "of_several_turns",
    "prompt_key",
    "ranking_of",
    "read_rankings",
    "split_by_prompt",
    "split_dialogue",
    "split_messages",
]
