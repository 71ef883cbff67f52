"""What makes decoding fast changes nothing: distinct prompts read once, room in the cache, rows that leave."""

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicLayer

from tests.conftest import tiny_model
from textenv.lm import Responses, ScalarHead, TokenRule, pad_left, response_logprobs, sample_responses
from textenv.lm.decoding import RoomyLayer
from textenv.lm.load import fuse_activations
from textenv.lm.sample import _closed_up, _draw

RULE = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0,))
PROMPTS = [[1, 2, 3], [4], [0, 5, 0, 6, 7], [8, 9], [2, 2, 2, 2], [10], [3, 0], [7, 6, 5, 4, 3, 2]]


def draw(model, prompts, seed=0, fill=0, width=None, **options):
    how = {"max_new_tokens": 6, "rule": RULE, "pad_id": 0, "generator": torch.Generator().manual_seed(seed), **options}
    return sample_responses(model, *pad_left(prompts, fill, width), **how)


@pytest.fixture
def passes(family_model):
    """The number of tokens that the trunk reads in each pass."""
    draw(family_model.model, [[1]])  # how it decodes has been measured
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())

    hook = family_model.model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_equal_prompts_are_read_once_and_without_padding(family_model, passes, copies):
    draw(family_model.model, [prompt for prompt in PROMPTS for _ in range(copies)], fill=11, width=9)
    assert passes[0] == sum(map(len, PROMPTS)) == 24
    assert passes[1] <= len(PROMPTS) * copies


def test_prompts_are_equal_by_their_real_tokens_alone(family_model, passes):
    """[5] after padding 5 is not [5, 5]; and the same prompt after other padding is the same."""
    ids, lengths = torch.tensor([[5, 5], [5, 5], [7, 5]]), torch.tensor([1, 2, 1])
    how = {"max_new_tokens": 2, "rule": TokenRule(), "pad_id": 0, "greedy": True}
    got = sample_responses(family_model.model, ids, lengths, **how)
    assert passes[0] == 3
    alone = [sample_responses(family_model.model, ids[i : i + 1], lengths[i : i + 1], **how) for i in range(3)]
    torch.testing.assert_close(got.logprobs, torch.cat([one.logprobs for one in alone]), atol=1e-5, rtol=0)


def test_the_responses_to_one_prompt_differ_and_each_prompt_gets_its_own(family_model):
    """Groups: the same numbers give the same tokens, whether a prompt shares its cache or stands alone."""
    group = [prompt for prompt in PROMPTS for _ in range(4)]
    together = draw(family_model.model, group)
    assert len({tuple(row) for row in together.response_ids[:4].tolist()}) > 1
    for size in (1, 4, 7, 30):
        first = draw(family_model.model, group[:size])
        assert torch.equal(first.response_ids, together.response_ids[:size])
        torch.testing.assert_close(first.logprobs, together.logprobs[:size], atol=1e-5, rtol=0)


def test_a_row_leaves_the_batch_when_it_has_ended(family_model, passes):
    sampled = draw(family_model.model, PROMPTS * 4, rule=TokenRule(stop_ids=(0, 1, 2, 3, 4)))
    going = [int((sampled.response_lengths > step).sum()) for step in range(1, 6)]
    assert passes[1:] == [count for count in going if count]
    assert len(set(going)) > 3


def test_rows_at_the_end_take_the_places_of_those_that_leave():
    def closed_up(*going):
        return _closed_up(torch.tensor(going, dtype=torch.bool)).tolist()

    assert closed_up(1, 1, 1) == [0, 1, 2]
    assert closed_up(0, 1, 0, 1, 1) == [3, 1, 4]
    assert closed_up(1, 1, 0, 0) == [0, 1]
    assert closed_up(0, 0, 1) == [2]
    assert closed_up(0, 0) == []


def test_a_number_falls_into_the_share_of_one_token():
    logprobs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    assert _draw(logprobs.expand(6, 6), numbers).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_draws_a_forbidden_token_and_each_token_has_its_share(dtype):
    """10,007 tokens, the first and last thousand of them forbidden: the smallest and largest numbers stay inside."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10_007, generator=generator, dtype=dtype)
    logits[:1000] = logits[-1000:] = -torch.inf
    logprobs = logits.log_softmax(-1)
    edge = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    assert ((_draw(logprobs.expand(3, -1), edge) - 5003).abs() <= 4003).all()
    grid = (torch.arange(50_000) + 0.5) / 50_000
    seen = _draw(logprobs.expand(50_000, -1)[:, 990:1010], grid).bincount(minlength=20) / 50_000
    torch.testing.assert_close(seen.to(dtype), logprobs[990:1010].softmax(-1), atol=5e-5, rtol=0)


def test_a_layer_with_room_holds_what_the_plain_one_holds():
    """Tokens come, rows leave, change places and come to the end of the room."""
    generator = torch.Generator().manual_seed(0)
    new = lambda rows, width: torch.randn(2, rows, 2, width, 4, generator=generator)  # noqa: E731
    plain, start = DynamicLayer(), new(6, 3)
    plain.update(*start)
    roomy = RoomyLayer(*start, room=2)
    for index in ([0, 1, 2, 3, 4, 5], [5, 1, 2, 3, 4], [4, 3, 2, 1, 0], [3, 1], [0, 1], [1], []):
        for layer in (plain, roomy):
            layer.reorder_cache(torch.tensor(index, dtype=torch.int64))
        states = new(len(index), 1)
        for got, want in zip(roomy.update(*states), plain.update(*states), strict=True):
            assert torch.equal(got, want)
        assert roomy.get_seq_length() == start.shape[3] + 1 or not index
        start = torch.cat([start[:, index] if index else start[:, :0], states], dim=3)


def test_a_fused_activation_is_that_of_transformers():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = NewGELUActivation()

    old, new = Old(), Old()
    fuse_activations(new)
    assert type(new.act) is nn.GELU
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    torch.testing.assert_close(new.act(x), old.act(x), atol=1e-12, rtol=0)


def test_a_loaded_gpt2_computes_its_activations_in_one_kernel():
    lm = tiny_model("gpt2")
    assert not any(isinstance(module, NewGELUActivation) for module in lm.model.modules())
    assert lm.model.config.activation_function == "gelu_new"


@pytest.mark.parametrize("slots", [1, 3, 8, 31])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "jamba", "mamba"])
def test_prompts_that_wait_for_a_slot_get_the_responses_they_get_at_once(family, slots):
    """Attention that forgets (Mistral, a window of 3) and states (Jamba) wait for a whole batch; Mamba has no cache."""
    model = tiny_model(family).model
    prompts, ends = PROMPTS * 4, TokenRule(stop_ids=(0, 1, 2), temperature=0.8)
    head = ScalarHead(32)
    nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    at_once = draw(model, prompts, rule=ends, value_head=head)
    assert len(set(at_once.response_lengths.tolist())) > 4
    heights = []
    count = lambda module, args, kwargs: heights.append(len(kwargs["input_ids"]))  # noqa: E731
    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    waited = draw(model, prompts, rule=ends, value_head=head, slots=slots)
    hook.remove()
    assert max(heights) <= slots
    for got, want in zip(waited, at_once, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    scored = response_logprobs(model, Responses(*pad_left(prompts, 0), *waited[:2]), ends)
    torch.testing.assert_close(waited.logprobs, scored, atol=1e-5, rtol=0)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_model_that_has_come_to_give_nan_is_refused(greedy):
    model, prompts = tiny_model().model, torch.tensor([[1, 2], [3, 4]])
    draw = {"max_new_tokens": 4, "rule": TokenRule(temperature=1.0, min_new_tokens=0, stop_ids=(0,)), "pad_id": 0}
    sample_responses(model, prompts, torch.tensor([2, 2]), **draw, greedy=greedy)
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"log-probabilities that are numbers, got NaN\. In training: it diverged"):
        sample_responses(model, prompts, torch.tensor([2, 2]), **draw, greedy=greedy)
