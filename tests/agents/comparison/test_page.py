"""The page of an evaluation: figures, shades, what is missing, and nothing that a model wrote is markup."""

import re

import numpy as np
import pytest

from agents.comparison.page import Answers, scale, shade, write_evaluation
from agents.comparison.tokens import TokenFigures
from textenv.evaluation import Evaluation
from textenv.stats import Mean

HOSTILE = "<script>alert(1)</script>"


def answers(name, kl=True, values=None):
    scores = np.array([1.0, -2.0, 3.0])
    found = Evaluation(
        prompts=["p0", f"p1 {HOSTILE}", "p2"],
        responses=["a0", f"a1 {HOSTILE}", ""],
        prompt_ids=np.arange(3),
        rewards=scores,
        rm_scores=scores,
        kl=np.array([0.25, 0.5, 0.75]) if kl else None,
        gold=None,
        lengths=np.array([2, 2, 1]),
        finish_reasons=["eos", "length", "eos"],
        response_ids=np.zeros((3, 2), dtype=np.int64),
        kl_per_token=np.full((3, 2), 0.25) if kl else None,
    )
    tokens = [TokenFigures([HOSTILE, "<eos>"], [0.5, -1.0] if kl else None, values, values) for _ in range(2)]
    return Answers(name, {"reward": Mean(0.6667, 0.1), "eos_rate": 2 / 3}, found, tokens)


def page(folder, *models):
    write_evaluation(folder / "report.html", models, [1, 2], ["my/Id-v0"])
    return (folder / "report.html").read_text("utf-8")


def test_the_page_is_one_file_and_shows_answers_as_text(tmp_path):
    text = page(tmp_path, answers(f"a{HOSTILE}"), answers("b"))
    assert "<script" not in text
    assert "http" not in text
    # The first model's name in the table, above two answers and in a note; row 1 of both; four first tokens; a prompt.
    assert text.count("&lt;script&gt;") == 4 + 2 + 4 + 1
    assert "p0" not in text
    assert text.count("<i>empty answer</i>") == 2
    assert "0.667 <small>±0.100</small>" in text
    assert "66.7" in text


def test_every_figure_stands_below_its_token(tmp_path):
    text = page(tmp_path, answers("a", values=[2.0, 4.0]))
    found = re.findall(r"<i style=\"background:(rgba.*?)\">(.*?)</i>", text)
    assert [value for _, value in found[:6]] == ["0.50", "2.00", "2.00", "−1.00", "4.00", "4.00"]
    assert [value for _, value in found[6:]] == [value for _, value in found[:6]]
    assert "rgba(230, 159, 0, 0.28)" in [colour for colour, value in found if value == "0.50"]
    assert {colour for colour, value in found if value == "−1.00"} == {"rgba(0, 114, 178, 0.55)"}
    assert "KL ±1.00 nats, value ±4.00 reward, advantage ±4.00 reward." in text


def test_what_is_missing_is_said(tmp_path):
    text = page(tmp_path, answers("drawn", values=[0.0, 0.0]), answers("chosen", kl=False))
    assert "chosen: its KL is unknown" in text
    assert "chosen: no value and advantage" in text
    assert "drawn: " not in text
    assert 'class="missing"' not in page(tmp_path, answers("whole", values=[0.0, 0.0]))


@pytest.mark.parametrize(
    ("figure", "most", "colour"),
    [
        (1.0, 2.0, "rgba(230, 159, 0, 0.28)"),
        (-1.0, 2.0, "rgba(0, 114, 178, 0.28)"),
        (9.0, 2.0, "rgba(230, 159, 0, 0.55)"),
        (0.0, 0.0, "rgba(0, 114, 178, 0.00)"),
    ],
)
def test_a_shade_tells_sign_and_size(figure, most, colour):
    assert shade(figure, most) == colour


def test_an_outlier_does_not_set_the_scale():
    assert scale([1.0] * 50 + [-1.0] * 49 + [1000.0]) == 1.0
    assert scale([]) == 0.0
