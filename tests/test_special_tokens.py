"""Special tokens of every kind: padding equal to EOS or missing, BOS or none, rows that no token has, odd templates.

What pads changes nothing, bit for bit; what a policy, a trainer and a reward model read of a chat is the same.
"""

import copy

import gymnasium
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import textenv
from agents.ppo import PPO, PPOConfig
from agents.sft import SFTConfig, load_demonstrations, mean_nll, summed_nll, tokenise, train_sft
from reward_models.scorers.texts import encode_for_decoder
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import PROMPTS, WORDS, tiny_model, word_tokenizer
from tests.oracles import alone
from textenv.episode import observation_tokens
from textenv.lm import TokenRule
from textenv.lm.load import load_language_model, wrap_language_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RECORDS = [
    {"prompt": "what is the sky ?", "completion": "blue"},
    {"prompt": "is <eos> the grass red ?", "completion": "not red the grass is green"},
    {"prompt": "red green", "completion": ""},
]
RANKINGS = [
    {"prompt": "what is the sky ?", "chosen": "blue", "rejected": "not red"},
    {"prompt": "grass", "chosen": "green", "rejected": "red red is the sky"},
]


def padded_by(token):
    """The same model, its tokenizer padding with a token of its own, with EOS, or with nothing."""
    lm = tiny_model("llama")
    words = word_tokenizer()
    words.pad_token = token
    lm.model.config.pad_token_id = words.pad_token_id
    return wrap_language_model(lm.model, words, name="padded")


def test_an_eos_in_a_prompt_is_learned_from_even_where_it_is_padding():
    """PyTorch's embeddings drop the gradient of the padding token; the oracle is a finite difference, in float64."""
    lm = padded_by("<eos>")
    model = lm.model.double()
    table = model.get_input_embeddings().weight
    examples = tokenise(lm, load_demonstrations(RECORDS[1:2]), SFTConfig())
    batch = examples.batch(torch.tensor([0]))
    summed_nll(model, batch).backward()
    with torch.no_grad():
        step = torch.zeros_like(table)
        step[0, 5] = 1e-4
        losses = []
        for sign in (1, -1):
            table += sign * step
            losses.append(summed_nll(model, batch).item())
            table -= sign * step
    assert table.grad[0, 5].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)
    assert table.grad[0].abs().max() > 0.1
    reward_model = TransformerRewardModel.from_language_model(lm)
    reward_model.model.get_input_embeddings().padding_idx = 0  # as a published one may have it
    again = TransformerRewardModel(reward_model.model, reward_model.tokenizer)
    assert again.model.get_input_embeddings().padding_idx is None


def trained_by_ppo(lm, text_options, **config):
    textenv.register_language_model("special", lambda: lm)
    env = gymnasium.make_vec("textenv/Text-v0", num_envs=16, **text_options | {"reference": "special"})
    settings = {"batch_size": 16, "epochs": 1, "minibatches": 2, "learning_rate": 1e-2, "seed": 0}
    agent = PPO(env.unwrapped, PPOConfig(**settings, **config))
    return agent.learn(32)


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture(scope="module")
def padded_with_eos():
    return padded_by("<eos>")


@pytest.mark.parametrize("pad", [None, "not"])
def test_what_pads_changes_no_weight_and_no_score(pad, padded_with_eos, text_options):
    other = padded_by(pad)
    assert (padded_with_eos.pad_id, other.pad_id) == (0, 0 if pad is None else WORDS.index("not"))
    config = SFTConfig(learning_rate=1e-2, epochs=2, batch_size=3)
    sft = [train_sft(lm, RECORDS, config).model.model for lm in (padded_with_eos, other)]
    assert torch.equal(flat(sft[0]), flat(sft[1]))
    ppo = [trained_by_ppo(lm, text_options).policy.model for lm in (padded_with_eos, other)]
    assert torch.equal(flat(ppo[0]), flat(ppo[1]))
    scored = [
        train_reward_model(lm, RANKINGS, RewardConfig(learning_rate=1e-2, batch_size=2)).model
        for lm in (padded_with_eos, other)
    ]
    scores = [model(PROMPTS, ["blue", "not not", "", "the <eos> sky"]) for model in scored]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(set(scores[0])) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"], ids=["tied", "untied"])
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_that_no_token_has_are_actions_like_others_and_are_saved(family, rank, text_options, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(family).model
    model.resize_token_embeddings(len(WORDS) + 4, mean_resizing=False)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied is (family == "gpt2")
    lm = wrap_language_model(model, word_tokenizer(), name="resized")
    assert lm.vocab_size == 16
    base = copy.deepcopy(model)
    agent = trained_by_ppo(lm, text_options, lora_rank=rank)
    assert agent.env.single_action_space.n == 16
    agent.save(tmp_path / "run")
    if rank:
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "policy")
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
        assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) is tied
    row = [1, 14, 3], [15, 12, 0]
    ours = alone(agent.policy.model, *row, TokenRule())
    torch.testing.assert_close(alone(plain.eval(), *row, TokenRule()), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_stands_once_before_every_prompt_for_policy_trainer_and_reward_model(adds, text_options, tmp_path):
    lm = tiny_model("llama")
    lm.tokenizer.bos_token = "not"
    if adds:
        special = [("not", WORDS.index("not"))]
        lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="not $A", special_tokens=special)
    lm.tokenizer.chat_template = "{{ bos_token + ' ' }}" + MERGING
    lm.save_pretrained(tmp_path)
    lm = load_language_model(tmp_path)
    bos = [WORDS.index("not")] * adds
    chat = [{"role": "user", "content": "red"}]
    prompts = ["the sky", chat]
    expected = [[*bos, 7, 4], [10, 8, 1, 6]]  # the template writes its own, once
    completions = ["blue", "blue"]
    assert read_by_environment(lm, prompts, text_options) == expected
    assert read_by_sft(lm, prompts, completions) == [(prompt, [3, 0]) for prompt in expected]
    assert read_by_reward_model(lm, prompts, completions) == [[*prompt, 3, 0] for prompt in expected]


MERGING = (
    "{% set system = messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'what ' + (system if loop.index < 3 else '') }}"
    "{{ m['content'] + ' ' }}{% elif m['role'] == 'assistant' %}{{ 'is ' + m['content'] + ' <eos> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'is ' }}{% endif %}"
)
DROPPING = MERGING.replace("(system if loop.index < 3 else '')", "''")
KEEPING = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
KEEPING += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"


def read_by_environment(lm, prompts, text_options):
    textenv.register_language_model("special", lambda: lm)
    options = text_options | {"reference": "special", "prompts": prompts, "max_prompt_tokens": 16}
    env = gymnasium.make("textenv/Text-v0", **options).unwrapped
    out = []
    for number in range(len(prompts)):
        observation, _ = env.reset(options={"prompt_id": number})
        batch = observation_tokens({name: value[None] for name, value in observation.items()}, 16)
        out.append(batch.prompt_ids[0, -int(batch.prompt_lengths) :].tolist())
    return out


def read_by_sft(lm, prompts, completions):
    records = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]
    examples = tokenise(lm, load_demonstrations(records), SFTConfig())
    return list(zip(lists(examples.prompts), lists(examples.responses), strict=True))


def read_by_reward_model(lm, prompts, completions):
    return lists(encode_for_decoder(lm.tokenizer, prompts, completions, 64).texts)


def lists(ragged):
    return [row.tolist() for row in ragged.flat.split(ragged.lengths.tolist())]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MERGING, "what red green is"),  # the system turn is a part of the user's
        (DROPPING, "what green is"),
        (KEEPING, "<unk> red <eos> <unk> green <eos> <unk>"),
    ],
    ids=["merges", "drops", "keeps"],
)
def test_a_system_turn_is_what_the_template_makes_of_it_for_all_alike(template, expected, text_options):
    lm = tiny_model("llama")
    lm.tokenizer.chat_template = template
    chat = [{"role": "system", "content": "red"}, {"role": "user", "content": "green"}]
    prompt = [WORDS.index(word) for word in expected.split()]
    assert read_by_environment(lm, [chat], text_options) == [prompt]
    assert read_by_sft(lm, [chat], ["blue"]) == [(prompt, [3, 0])]
    assert read_by_reward_model(lm, [chat], ["blue"]) == [[*prompt, 3, 0]]
    messages = {"messages": [*chat, {"role": "assistant", "content": "blue"}]}
    examples = tokenise(lm, load_demonstrations([messages]), SFTConfig())
    nll = mean_nll(lm.model, examples, 1)
    assert nll == pytest.approx(-alone(lm.model, prompt, [3, 0], TokenRule()).mean().item(), rel=1e-5)


def test_an_answer_that_spells_the_end_of_a_turn_is_taught_whole():
    lm = tiny_model("llama")
    lm.tokenizer.chat_template = KEEPING
    chat = [{"role": "user", "content": "green"}]
    [(_, taught)] = read_by_sft(lm, [chat], ["blue <eos> sky"])
    assert taught == [WORDS.index(word) for word in ("blue", "<eos>", "sky", "<eos>")]
