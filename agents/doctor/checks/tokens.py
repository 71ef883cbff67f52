"""The tokenizer and the chat template: special tokens, and texts that survive their way through tokens."""

from collections.abc import Iterator
from typing import Any

from agents.doctor.finding import Check, Seen
from agents.doctor.parts import ModelPart, Text, has_system_turn, refusal
from textenv.conformance.subject import Skipped
from textenv.lm.chat import chat_text, template_ending
from textenv.lm.heads import output_embeddings

PROBES = (
    "The answer is 42.",
    "Ünïcode — “quotes”, 漢字 🙂",
    "  two  spaces,\ttabs\n\nand lines ",
    "def f(x): return x**2",
)
"""Texts of everyday kinds, for a set-up without data."""


def pad_token(part: ModelPart) -> Iterator[Seen]:
    """The padding token is a token of its own."""
    tokenizer: Any = part.lm.tokenizer
    if tokenizer.pad_token_id is None:
        yield Seen("note", "the tokenizer has no padding token; EOS is used")
    elif tokenizer.pad_token_id in part.lm.ending_ids:
        yield Seen("note", f"the padding token {tokenizer.pad_token!r} also ends a response")


def vocabulary(part: ModelPart) -> Iterator[Seen]:
    """Every token has a row in the embedding and in the LM head."""
    tokenizer: Any = part.lm.tokenizer
    known = max(tokenizer.get_vocab().values()) + 1
    embedding: Any = part.lm.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    actions = output_embeddings(part.lm.model).weight.shape[0]
    if known > min(rows, actions):
        place = "embedding" if rows <= actions else "LM head"
        yield Seen("error", f"the tokenizer has ids up to {known - 1}, the {place} {min(rows, actions)} rows")
    elif actions > known:
        yield Seen("note", f"the LM head has {actions - known} rows that stand for no token")


def ending_tokens(part: ModelPart) -> Iterator[Seen]:
    """The tokenizer, the generation config and the chat template name the same ending token."""
    lm, tokenizer = part.lm, part.lm.tokenizer
    named: Any = getattr(lm.model.generation_config, "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    words: Any = tokenizer.convert_ids_to_tokens
    if lm.eos_id >= lm.vocab_size:
        yield Seen("error", f"EOS {tokenizer.eos_token!r} is beyond the LM head: no response can end")
    if not listed:
        yield Seen("warning", f"generation_config has no eos_token_id; the tokenizer's EOS is {tokenizer.eos_token!r}")
    elif lm.turn_end_id not in listed:
        ends = f"a turn ends with {words(lm.turn_end_id)!r}"
        yield Seen("warning", f"{ends}, but generate stops at {', '.join(map(repr, words(listed)))} alone")


def bos(part: ModelPart) -> Iterator[Seen]:
    """A prompt starts with BOS once where the tokenizer puts one, chat or not."""
    lm, tokenizer = part.lm, part.lm.tokenizer
    if not _adds_bos(part):
        raise Skipped("the tokenizer puts no BOS before a text")
    written = [text.prompt for text in part.texts if not refusal(lm, text.prompt)]
    twice = [prompt for prompt in written if lm.encode_prompt(prompt)[:2] == [tokenizer.bos_token_id] * 2]
    if twice:
        yield Seen("error", f"{len(twice)} of {len(written)} prompts start with BOS twice: {str(twice[0])[:60]!r}")
    if tokenizer.chat_template is not None:
        chat = lm.encode_prompt([{"role": "user", "content": "question"}])
        if chat[0] != tokenizer.bos_token_id:
            yield Seen("warning", f"texts start with {tokenizer.bos_token!r}, but the chat template writes none")
        elif chat[1] == tokenizer.bos_token_id:
            yield Seen("error", f"the chat template writes {tokenizer.bos_token!r} twice")
        else:
            yield Seen("note", f"the chat template writes {tokenizer.bos_token!r}, and the tokenizer would add another")


def _adds_bos(part: ModelPart) -> bool:
    tokenizer: Any = part.lm.tokenizer
    first = tokenizer("").input_ids[:1]
    return bool(first) and first[0] == tokenizer.bos_token_id


def system_turn(part: ModelPart) -> Iterator[Seen]:
    """The chat template writes a system turn, apart from the user's."""
    _need_template(part)
    messages = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "QUESTION"}]
    try:
        text = part.lm.prompt_text(messages)
    except Exception as error:  # whatever a template raises
        count = sum(has_system_turn(text.prompt) for text in part.texts)
        listed = f"; {count} of {len(part.texts)} texts of the data have one" if count else ""
        yield Seen("error" if count else "warning", f"the chat template refuses a system turn: {error}{listed}")
        return
    if "SYSTEM" not in text:
        yield Seen("warning", "the chat template drops the system turn")
    elif not text.partition("SYSTEM")[2].partition("QUESTION")[0].strip():
        yield Seen("note", "the chat template merges the system turn into the user's")


def answer_after_prompt(part: ModelPart) -> Iterator[Seen]:
    """A chat with its answer is the prompt, the answer and the ending, token by token."""
    _need_template(part)
    lm, tokenizer = part.lm, part.lm.tokenizer
    chat = [{"role": "user", "content": "QUESTION"}]
    whole = chat_text(tokenizer, [*chat, {"role": "assistant", "content": "ANSWER"}])
    if not whole.startswith(lm.prompt_text(chat)):
        yield Seen("warning", f"with an answer, the template writes another beginning: {whole[:80]!r}")
        return
    apart = [*lm.encode_prompt(chat), *lm.encode_response("ANSWER", eos=False), *template_ending(tokenizer)]
    if tokenizer(whole, add_special_tokens=False).input_ids != apart:
        what = "the template gives an answer other tokens than its own"
        yield Seen("warning", f"{what}: they are learned, and a reward model that reads plain answers sees others")
    elif found := [text for text in part.texts if _rendered_otherwise(part, text)]:
        chats = sum(not isinstance(text.prompt, str) for text in part.texts)
        what = f"{len(found)} of {chats} chats of the data get other tokens with their answer than before it"
        yield Seen("warning", f"{what}: {found[0].response[:40]!r}")
    if not template_ending(tokenizer):
        yield Seen("warning", "the template puts nothing after an answer: only EOS tells where it ends")


def _rendered_otherwise(part: ModelPart, text: Text) -> bool:
    """Whether a chat with its response is not the prompt, the response and the ending, token by token."""
    lm, tokenizer = part.lm, part.lm.tokenizer
    if isinstance(text.prompt, str) or refusal(lm, text.prompt):
        return False
    try:
        whole = chat_text(tokenizer, [*text.prompt, {"role": "assistant", "content": text.response}])
        apart = [*lm.encode_prompt(text.prompt), *lm.encode_response(text.response, eos=False)]
    except Exception:  # unknown words, of which the round trip speaks, or whatever a template raises
        return False
    return tokenizer(whole, add_special_tokens=False).input_ids != [*apart, *template_ending(tokenizer)]


def _need_template(part: ModelPart) -> None:
    if part.lm.tokenizer.chat_template is None:
        raise Skipped("the tokenizer has no chat template")


def round_trip(part: ModelPart) -> Iterator[Seen]:
    """A text comes back from its tokens as it was."""
    lm, tokenizer = part.lm, part.lm.tokenizer
    texts = [text.response for text in part.texts] or list(PROBES)
    unknown = tokenizer.unk_token_id
    changed: list[str] = []
    strange: list[str] = []
    for text in texts:
        try:
            ids = lm.encode_response(text, eos=False)
        except ValueError:
            strange.append(text)
            continue
        if unknown is not None and unknown in ids:
            strange.append(text)
        elif lm.decode(ids) != text:
            changed.append(text)
    if not part.texts and strange:
        raise Skipped("the tokenizer does not know the words of ordinary texts; give data")
    if strange:
        yield Seen("error", f"{len(strange)} of {len(texts)} responses have unknown tokens: {strange[0][:60]!r}")
    if changed:
        back = lm.decode(lm.encode_response(changed[0], eos=False))
        yield Seen("warning", f"{len(changed)} of {len(texts)} texts change: {changed[0][:40]!r} → {back[:40]!r}")


def joint_tokens(part: ModelPart) -> Iterator[Seen]:
    """Prompt and response have the same tokens together and apart."""
    lm = part.lm
    plain = [text for text in part.texts if isinstance(text.prompt, str) and text.response]
    if not plain:
        raise Skipped("there are no texts that are no chats")
    differing = []
    for prompt, response in plain:
        apart = [*lm.encode_prompt(prompt), *lm.encode_response(response, eos=False)]
        if apart not in [_joined(part, prompt + space + response) for space in ("", " ")]:
            differing.append(prompt[-20:] + "|" + response[:20])
    if differing:
        what = f"{len(differing)} of {len(plain)} texts have other tokens when prompt and response are joined first"
        yield Seen("warning", f"{what}: …{differing[0]!r}")


def _joined(part: ModelPart, text: str) -> list[int]:
    """Its tokens, without an EOS that the tokenizer puts after every text; none where it does not know a word."""
    tokenizer: Any = part.lm.tokenizer
    try:
        ids = part.lm.encode_prompt(text)
    except ValueError:
        return []
    return ids[:-1] if tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id] else ids


TOKEN_CHECKS = {
    "pad token": Check(
        pad_token,
        "Harmless here, where masks come from lengths. A mask from ids != pad drops the EOS, which is never learned "
        "(trl 976, 1623, 3091; transformers 35352; torchrl 3580).",
        "Elsewhere, add a padding token of its own, or derive masks from lengths.",
    ),
    "vocabulary": Check(
        vocabulary,
        "An id without a row is an index error on a CPU, and garbage or a hung kernel on some GPUs (transformers "
        "1848, 24698).",
        "Call model.resize_token_embeddings(len(tokenizer)), or load the tokenizer that belongs to the model.",
    ),
    "ending tokens": Check(
        ending_tokens,
        "Here each of them ends an episode. Where generate knows only one, it writes on after the answer: base models' "
        "EOS left in instruct checkpoints (Llama 3's <|eot_id|> was missing there at first: vllm 4180; trl 7039).",
        "List every ending token in generation_config.eos_token_id.",
    ),
    "BOS": Check(
        bos,
        "A doubled or missing BOS shifts a model off what it was trained on, quietly: a rendered chat that is "
        "tokenised with special tokens has two (sglang 888; open-r1 462; transformers 31796).",
        "Pass chats as messages, not as rendered strings; tokenise rendered chats with add_special_tokens=False.",
    ),
    "system turn": Check(
        system_turn,
        "Instructions in the data that the template drops are trained on as if nobody had given them (onetwo 6; "
        "lm-evaluation-harness 2069).",
        "Put the instructions into the user's turn, or change the template.",
    ),
    "answer after prompt": Check(
        answer_after_prompt,
        "The policy continues the prompt as it was rendered; data rendered in another way teaches a context that never "
        "comes (templates that drop or add a thinking part: verl 6854; trl 6361).",
        "Change the template so that an answer continues the generation prompt.",
    ),
    "round trip": Check(
        round_trip,
        "A reward model reads the decoded text, and people wrote the original (trl 1674, 1979: texts read with another "
        "tokenizer).",
        "Check the normaliser and clean_up_tokenization_spaces; drop texts that the tokenizer cannot write.",
    ),
    "joint tokens": Check(
        joint_tokens,
        "The policy starts from the prompt's own tokens. Trainers that join the texts first learn another boundary "
        "and mask the wrong token there (trl 1960, 2054, 2209).",
        "End prompts without a space and start responses with one, or the reverse; be the same everywhere.",
    ),
}
