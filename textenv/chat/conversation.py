"""A conversation with a language model, its answers drawn as an environment draws them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from textenv.chat.stream import TextStream
from textenv.kl import kl_k1
from textenv.lm import LanguageModel, Responses, TokenRule, response_logprobs, sample_responses
from textenv.protocols import RewardModel
from textenv.scoring import score_texts

Message = dict[str, str]


class Answer(NamedTuple):
    """An answer of a model."""

    prompt: str | Sequence[Message]
    """What it answers: a text, or chat messages."""
    text: str
    prompt_ids: list[int]
    response_ids: list[int]
    """The ending token included."""
    ending: str
    """"eos", "stop", "length", or "interrupted"."""


class Conversation:
    """A conversation with one model. One with a chat template hears all that was said before; another model continues
    each text on its own."""

    def __init__(
        self,
        model: LanguageModel,
        rule: TokenRule,
        *,
        max_new_tokens: int = 256,
        template: str | None = None,
        seed: int | None = None,
    ) -> None:
        """``template``: the text to continue, ``{}`` standing for what is said; None: the model's chat template, or the
        words alone. ``seed``: of the sampling; None takes another one each time.

        Raises:
            ValueError: the template has no place for what is said.
        """
        if template is not None and "{}" not in template:
            raise ValueError(f"template must say where the words go, got {template!r}. Write {{}} there.")
        self.model, self.rule, self.max_new_tokens = model, rule, max_new_tokens
        self._chats = template is None and model.tokenizer.chat_template is not None
        self._template = template or "{}"
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self.messages: list[Message] = []
        self.last: Answer | None = None

    def ask(self, words: str, show: Callable[[str], object] = lambda text: None) -> Answer:
        """Say something and draw the answer, whose text is shown piece by piece; KeyboardInterrupt ends it.

        Raises:
            ValueError: the model does not know the words, or has no room for them. They count as not said.
        """
        return self._answer([*self.messages, {"role": "user", "content": words}], show)

    def again(self, show: Callable[[str], object] = lambda text: None) -> Answer:
        """Draw another answer in the place of the last one.

        Raises:
            ValueError: nothing has been said.
        """
        if not self.messages:
            raise ValueError("there must be an answer to draw again, got none yet. Say something first.")
        return self._answer(self.messages[:-1], show)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages, self.last = [], None

    def _answer(self, messages: list[Message], show: Callable[[str], object]) -> Answer:
        model = self.model
        prompt = messages if self._chats else self._template.replace("{}", messages[-1]["content"])
        prompt_ids = model.encode_prompt(prompt)
        room = self.max_new_tokens if model.max_tokens is None else model.max_tokens - len(prompt_ids)
        if not prompt_ids or room < 1:
            rule = "what was said must have a token and leave room for an answer"
            found = f"{len(prompt_ids)} tokens where {model.max_tokens} have room"
            raise ValueError(f"{rule}, got {found}. Say something shorter, or forget the rest with /reset.")
        stream, drawn, pieces = TextStream(model.tokenizer), [], []

        def tell(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        def take(rows: torch.Tensor, tokens: torch.Tensor) -> None:
            drawn.append(int(tokens))
            if drawn[-1] not in model.ending_ids:
                tell(stream.add(drawn[-1]))

        try:
            sample_responses(
                model.model,
                torch.tensor([prompt_ids]),
                torch.tensor([len(prompt_ids)]),
                max_new_tokens=min(room, self.max_new_tokens),
                rule=self.rule,
                pad_id=model.pad_id,
                generator=self._generator,
                on_tokens=take,
            )
            ending = "eos" if drawn[-1] in model.ending_ids else "stop" if drawn[-1] in self.rule.stop_ids else "length"
        except KeyboardInterrupt:
            ending = "interrupted"
        tell(stream.rest())
        answer = Answer(prompt, "".join(pieces), prompt_ids, drawn, ending)
        if drawn:
            self.messages, self.last = [*messages, {"role": "assistant", "content": answer.text}], answer
        return answer


class Judge(NamedTuple):
    """What answers are measured by."""

    reference: LanguageModel | None
    reward_model: RewardModel | None

    def check(self, model: LanguageModel) -> None:
        """Refuse a model whose KL from the reference means nothing."""
        other = self.reference
        if other is None:
            return
        same = other.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        if not same or other.vocab_size != model.vocab_size:
            raise ValueError(
                f"the reference must have the tokens of the model, got {other.name!r} for {model.name!r}. Name another "
                "--reference, or leave it out."
            )

    def score(self, model: LanguageModel, answer: Answer) -> float | None:
        """The reward model's score of an answer; None without a reward model."""
        if self.reward_model is None:
            return None
        columns: dict[str, Any] = {"finish_reason": [answer.ending]}
        if not isinstance(answer.prompt, str):
            columns["chat"] = [list(answer.prompt)]
        texts = [model.prompt_text(answer.prompt)], [answer.text]
        return float(score_texts(self.reward_model, *texts, columns)[0])

    def kl(self, model: LanguageModel, answer: Answer, rule: TokenRule) -> Float[torch.Tensor, " T"] | None:
        """log π − log π_ref of each token, nats; None without a reference."""
        if self.reference is None:
            return None
        ids = torch.tensor([answer.prompt_ids]), torch.tensor([answer.response_ids])
        batch = Responses(ids[0], torch.tensor([ids[0].shape[1]]), ids[1], torch.tensor([ids[1].shape[1]]))
        own, theirs = (response_logprobs(m.model, batch, rule)[0].numpy() for m in (model, self.reference))
        return torch.from_numpy(kl_k1(own, theirs))
