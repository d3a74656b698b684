"""Answers token by token: sampling, stopping, and text that never breaks inside a character.

Knows a model, a tokenizer and token ids; neither pipes nor people, nor which adapter a model carries.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

FinishReason = Literal["stop", "length", "cancelled"]
REPLACEMENT = "\ufffd"  # what a tokenizer decodes to when the bytes of a character are not complete


class GenerationError(ValueError):
    """The answer cannot go on. The message is a sentence for the person who asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


class Sampler:
    """One draw a token from softmax(logits / temperature), cut to the smallest set whose mass reaches top_p.

    Every side has its own generator with the same seed and turns one uniform number a step into a token, so
    two sides with equal predictions give equal answers: a difference on screen is one of the models.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [V] -> token id."""
        if self._temperature == 0.0:
            best = int(logits.argmax())
            if not torch.isfinite(logits[best]):
                raise GenerationError(_NOT_A_NUMBER)
            return best
        scores = logits.detach().to("cpu", torch.float32) / self._temperature
        probabilities, ids = torch.softmax(scores, dim=-1).sort(descending=True, stable=True)
        mass = probabilities.double().cumsum(0)  # [V]
        if not bool(torch.isfinite(mass[-1])):
            raise GenerationError(_NOT_A_NUMBER)
        kept = 1 + int(torch.searchsorted(mass, min(self._top_p, float(mass[-1]))))
        kept = min(kept, len(mass))
        draw = torch.rand((), generator=self._generator, dtype=torch.float64) * mass[kept - 1]
        return int(ids[min(int(torch.searchsorted(mass[:kept], draw, right=True)), kept - 1)])


_NOT_A_NUMBER = (
    "The model's predictions are not numbers, so no token can be chosen. "
    "Its training probably diverged: look at its loss chart, and train again with a lower learning_rate."
)


class TextStream:
    """Turns token ids into text as they come, holding back bytes that do not make a character yet."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: some tokenizers treat a first token differently
        self._shown = 0  # ids whose text has been given out

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # noqa: S101 - a list of ids decodes to one string
        return text

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What was held back, at the end, without the bytes of a character that the last token cut off."""
        return self._advance(self._decode(self._ids[self._start :]).rstrip(REPLACEMENT))

    def _advance(self, text: str) -> str:
        known = len(self._decode(self._ids[self._start : self._shown]))
        if len(text) <= known:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[known:]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something to tell about one side: new text, and at the end how it finished."""

    side: str
    text: str
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class Answer:
    """One side: a model, its prompt, its cache of keys and values, and what it has said so far."""

    def __init__(
        self, side: str, model: Any, prompt: Sequence[int], tokenizer: Any, sampling: Sampling
    ) -> None:
        room = context_length(model) - len(prompt)
        if room < 1:
            raise GenerationError(
                f"The conversation has {len(prompt)} tokens and the model reads {context_length(model)}. "
                "Shorten the prompt, or start a new conversation."
            )
        self.side = side
        self._model = model
        self._prompt = len(prompt)
        self._next = torch.tensor([list(prompt)], device=model.device)  # [1, T], later [1, 1]
        self._cache = DynamicCache(config=model.config)
        self._sample = Sampler(sampling)
        self._text = TextStream(tokenizer)
        self._eos = eos_tokens(model, tokenizer)
        self._limit = min(sampling.max_new_tokens, room)
        self._few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.tokens: list[int] = []
        self._seconds = 0.0

    def step(self) -> Piece:
        """One forward pass, one token."""
        started = time.perf_counter()
        token = self._sample(self._logits())
        self._seconds += time.perf_counter() - started
        if token in self._eos:
            return self.finish("stop")
        self.tokens.append(token)
        text = self._text.push(token)
        if len(self.tokens) >= self._limit:
            return self.finish("length", text)
        self._next = torch.tensor([[token]], device=self._next.device)
        return Piece(self.side, text)

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """[V], of the last position."""
        extra = {"logits_to_keep": 1} if self._few_logits else {}
        output = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True, **extra)
        logits: Tensor = output.logits[0, -1]
        return logits

    def finish(self, reason: FinishReason, text: str = "") -> Piece:
        return Piece(
            self.side,
            text + self._text.flush(),
            reason,
            self._prompt,
            len(self.tokens),
            round(self._seconds, 3),
        )


def generate(answers: Sequence[Answer], *, is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
    """A token of each side in turn, so that the sides appear together.

    Why not both sides in one batch: peft can mix adapters in a batch, but the matrix products of a batch of
    two round differently. In float32 the logits moved by 4e-5; in bfloat16 the text became another one.
    """
    active = list(answers)
    while active:
        for answer in list(active):
            piece = answer.finish("cancelled") if is_cancelled() else answer.step()
            if piece.finish_reason is not None:
                active.remove(answer)
            if piece.text or piece.finish_reason is not None:
                yield piece


def eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = tokenizer.eos_token_id
    return frozenset(listed if own is None else [*listed, own])


def context_length(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
