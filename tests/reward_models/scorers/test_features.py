"""Features of a frozen trunk on disk: the same as fresh ones, found again, never those of another trunk or text."""

import contextlib
import sqlite3

import pytest
import torch

from reward_models.scorers import features as module
from reward_models.scorers.features import trunk_features
from reward_models.scorers.heads import score_features, score_head
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import PROMPTS, tiny_model
from tests.reward_models.scorers.test_reading import SEGMENTED, encoder
from tests.reward_models.training.test_trainer import toy_rankings

TEXTS = ["blue", "green grass", "not red is the sky blue", "red"]


@pytest.fixture
def model(family_model) -> TransformerRewardModel:
    reward_model = TransformerRewardModel.from_language_model(family_model, batch_size=2)
    with torch.no_grad():
        score_head(reward_model.model).weight.normal_(generator=torch.Generator().manual_seed(0))
    return reward_model


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many texts each pass through a trunk read."""
    seen: list[int] = []
    original = module.features_of_rows

    def counted(trunk, input_ids, lengths, **types):
        seen.append(len(lengths))
        return original(trunk, input_ids, lengths, **types)

    monkeypatch.setattr(module, "features_of_rows", counted)
    return seen


def test_the_head_on_kept_features_gives_the_scores_of_the_whole_model(model, tmp_path):
    texts = model.encode(PROMPTS, TEXTS)
    trunk_features(model, texts, tmp_path / "features.sqlite")
    kept = trunk_features(model, texts, tmp_path / "features.sqlite")
    torch.testing.assert_close(score_features(model.model, kept), model.scores(texts), rtol=1e-5, atol=1e-6)


def test_a_text_is_read_once_by_a_trunk_whatever_its_head(model, tmp_path, passes):
    file = tmp_path / "features.sqlite"
    first = trunk_features(model, model.encode(PROMPTS, TEXTS), file)
    assert sum(passes) == 4
    with torch.no_grad():
        score_head(model.model).weight.fill_(1.0)
    model.model.config.score_unit = 7.0
    again = trunk_features(model, model.encode([*PROMPTS, "red"], [*TEXTS, "sky"]), file)
    assert sum(passes) == 5, "only the new text"
    assert torch.equal(again[:4], first)


def test_another_trunk_never_finds_them(model, tmp_path, passes):
    file, texts = tmp_path / "features.sqlite", model.encode(PROMPTS, TEXTS)
    before = trunk_features(model, texts, file)
    with torch.no_grad():
        next(model.model.base_model.parameters()).add_(0.1)
    after = trunk_features(model, texts, file)
    assert sum(passes) == 8
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, trunk_features(model, texts))


def test_an_interrupted_reading_goes_on_where_it_stopped(model, tmp_path, passes):
    def stop(done, total):
        raise KeyboardInterrupt

    file, texts = tmp_path / "features.sqlite", model.encode(PROMPTS, TEXTS)
    with pytest.raises(KeyboardInterrupt):
        trunk_features(model, texts, file, stop)
    assert passes == [2]
    told: list[tuple[int, int]] = []
    features = trunk_features(model, texts, file, lambda done, total: told.append((done, total)))
    assert (passes, told) == ([2, 2], [(4, 4)])
    torch.testing.assert_close(features, trunk_features(model, texts))


def test_training_a_head_on_a_feature_file_is_training_it_without_one(tmp_path, passes):
    rankings, held_out = toy_rankings(60, 0), toy_rankings(20, 1)
    plain = RewardConfig(freeze_trunk=True, learning_rate=1e-2, batch_size=16, epochs=2)
    kept = RewardConfig(**{**vars(plain), "feature_file": str(tmp_path / "features.sqlite")})
    results = []
    for config in (plain, kept, kept):
        passes.append(0)
        results.append(train_reward_model(tiny_model(), rankings, config, eval_rankings=held_out))
    assert passes[-1] == 0, "the third run reads nothing"
    weights = [score_head(result.model.model).weight for result in results]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert results[0].metrics["eval_nll_per_ranking"] == results[2].metrics["eval_nll_per_ranking"]


def test_a_file_that_is_no_database_and_a_trunk_that_learns_are_refused(model, tmp_path):
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match=r"SQLite.*text\.sqlite"):
        trunk_features(model, model.encode(PROMPTS, TEXTS), tmp_path / "text.sqlite")
    with pytest.raises(ValueError, match="freeze_trunk"):
        RewardConfig(feature_file="features.sqlite")


@pytest.mark.parametrize("value", [b"ab", bytes(4 * 31), bytes(4 * 33), "text", 1.0, None], ids=repr)
def test_a_damaged_row_is_refused_with_the_name_of_the_file(value, model, tmp_path):
    file, texts = tmp_path / "features.sqlite", model.encode(PROMPTS, TEXTS)
    trunk_features(model, texts, file)
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE features SET value = ? WHERE key = (SELECT MAX(key) FROM features)", (value,))
    with pytest.raises(ValueError, match=r"a feature file must hold .*got .* in '.*features\.sqlite'\. .*remove it"):
        trunk_features(model, texts, file)


def test_a_file_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"a feature file must be .* got '.*file/features\.sqlite':"):
        trunk_features(model, model.encode(PROMPTS, TEXTS), tmp_path / "file" / "features.sqlite")


def test_the_file_holds_no_text(model, tmp_path):
    trunk_features(model, model.encode(PROMPTS, TEXTS), tmp_path / "features.sqlite")
    with sqlite3.connect(tmp_path / "features.sqlite") as database:
        rows = database.execute("SELECT key, value FROM features").fetchall()
    assert {len(key) for key, _ in rows} == {32}
    assert {len(value) for _, value in rows} == {4 * 32}


def test_equal_tokens_of_other_segments_are_another_text(tmp_path, passes):
    model = encoder("bert", tmp_path / "start")
    model.tokenizer.model_input_names = SEGMENTED
    # <cls> red <sep> blue <sep> <sep> both times; "blue" belongs to the prompt, then to the response.
    texts = model.encode(["red <sep> blue", "red"], ["", "blue <sep>"])
    assert texts.padded(torch.tensor([0]))[0].tolist() == texts.padded(torch.tensor([1]))[0].tolist()
    first, second = trunk_features(model, texts, tmp_path / "features.sqlite")
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(trunk_features(model, texts, tmp_path / "features.sqlite"), torch.stack([first, second]))
    assert sum(passes) == 2
