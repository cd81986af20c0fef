"""A text that a model and a user write in turns, and the decoding state that goes with it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer, set_seed

from rosakit.errors import CheckpointError, InvalidInputError, warn_once
from rosakit.tuning.attach import is_attached
from rosakit.tuning.memory import CacheMemory, cache_memory
from rosakit.tuning.session import load_session, save_session

__all__ = ["Conversation", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen.

    Attributes:
        max_new_tokens: at most this many tokens a turn.
        temperature: 0 always takes the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
        top_k: sample from this many tokens; 0 for all.
        seed: makes sampling repeatable; None for a different text each time.
        prompt_lookup: tokens guessed at once from earlier text and then checked; 0 for none. The
            text stays what it would be, see transformers' prompt lookup decoding.

    Raises:
        InvalidInputError: a setting out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        if (
            self.max_new_tokens < 1
            or self.temperature < 0
            or not 0 < self.top_p <= 1
            or self.top_k < 0
            or self.prompt_lookup < 0
        ):
            raise InvalidInputError(
                "generation needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= "
                f"0 and prompt_lookup >= 0; got {self.max_new_tokens}, {self.temperature}, "
                f"{self.top_p}, {self.top_k} and {self.prompt_lookup}"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        found: dict[str, Any] = {
            "do_sample": self.temperature > 0,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.temperature > 0:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.prompt_lookup:
            found["prompt_lookup_num_tokens"] = self.prompt_lookup
        return found


class Conversation:
    """Turns of text with one cache: each turn reads only what is new.

    Args:
        model: a causal language model, attached or not.
        tokenizer: its tokenizer.
        chat: turns are messages in the tokenizer's chat template; otherwise plain text.
        prefill_chunk: tokens that are read at once, which bounds the memory of a long prompt.

    Raises:
        InvalidInputError: no chat template, or a chunk below 1.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, chat: bool = False, prefill_chunk: int = 4096
    ) -> None:
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInputError("the tokenizer has no chat template; leave out chat")
        if prefill_chunk < 1:
            raise InvalidInputError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.prefill_chunk = prefill_chunk
        self.messages: list[dict[str, str]] = []
        self.ids: Tensor = torch.zeros((1, 0), dtype=torch.int64, device=model.device)
        self.cache: Any = None

    def turn(
        self, text: str, write: Callable[[str], None], sampling: Sampling | None = None
    ) -> str:
        """Add text and let the model go on.

        Args:
            text: what the user says, or text to continue.
            write: called with each new piece of the model's text.
            sampling: how tokens are chosen.

        Returns:
            What the model wrote.

        Raises:
            InvalidInputError: an empty text.
        """
        sampling = Sampling() if sampling is None else sampling
        ids = self._extended(text)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        pad = self.tokenizer.pad_token_id
        if sampling.seed is not None:
            set_seed(sampling.seed)
        with torch.inference_mode():
            self._read(ids[:, :-1])
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                return_dict_in_generate=True,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                streamer=_Pieces(self.tokenizer, take),
                **sampling.options(),
            )
        self.ids, self.cache = out.sequences, out.past_key_values
        answer = "".join(pieces)
        if self.chat:
            self.messages.append({"role": "assistant", "content": answer})
        return answer

    @property
    def memory(self) -> CacheMemory | None:
        """Bytes of the decoding state; None before the first turn or without rosakit."""
        if self.cache is None or not is_attached(self.model):
            return None
        return cache_memory(self.cache)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write text and decoding state to a file, atomically.

        Raises:
            InvalidInputError: nothing was said yet, or the model is not attached.
            CheckpointError: it cannot be written.
        """
        if self.cache is None:
            raise InvalidInputError("there is nothing to save before the first turn")
        read = self.cache.get_seq_length()
        notes = {
            "messages": self.messages,
            "chat": self.chat,
            "unread": self.ids[0, read:].tolist(),
        }
        save_session(path, self.model, self.cache, input_ids=self.ids[:, :read], notes=notes)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up a saved conversation.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or one of another kind of turns.
            InvalidInputError: the model is not attached.
        """
        found = load_session(path, self.model)
        notes = found.notes
        if found.input_ids is None or not {"messages", "chat", "unread"} <= set(notes):
            raise CheckpointError(f"the session {path} holds a cache, but no text to go on with")
        if notes["chat"] != self.chat:
            kinds = ("plain text", "chat messages")
            raise CheckpointError(
                f"the session {path} holds {kinds[bool(notes['chat'])]}, not "
                f"{kinds[self.chat]}; use it with{'' if notes['chat'] else 'out'} chat"
            )
        unread = torch.tensor([notes["unread"]], dtype=torch.int64, device=found.input_ids.device)
        self.ids = torch.cat([found.input_ids, unread], dim=1)
        self.cache, self.messages = found.cache, list(notes["messages"])

    def _extended(self, text: str) -> Tensor:
        """All ids with the new text; `messages` take it in."""
        if not text:
            raise InvalidInputError("the prompt is empty; give some text to continue")
        if self.chat:
            text = self._rendered(text)
        first = not self.chat and self.ids.shape[1] == 0
        new = self.tokenizer(text, add_special_tokens=first, return_tensors="pt")["input_ids"]
        ids = torch.cat([self.ids, new.to(self.ids.device, torch.int64)], dim=1)
        if ids.shape[1] == 0:
            raise InvalidInputError("the tokenizer made no token of the prompt; give another text")
        return ids

    def _rendered(self, text: str) -> str:
        """What the template adds to the text so far for one more message of the user."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        whole = self._template(self.messages)
        if not before:
            return whole
        for answer in (before[-1]["content"], before[-1]["content"].strip()):
            shown = self._template(before[:-1]) + answer
            if whole.startswith(shown):
                rest = whole[len(shown) :]
                end = self.tokenizer.eos_token
                ended = int(self.ids[0, -1]) == self.tokenizer.eos_token_id
                return rest.removeprefix(end) if ended and end else rest
        warn_once(
            "rosakit: this chat template rewrites earlier turns, so the whole conversation is read "
            "again each turn"
        )
        self.ids, self.cache = self.ids[:, :0], None
        return whole

    def _template(self, messages: list[dict[str, str]]) -> str:
        made: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return made

    def _read(self, ids: Tensor) -> None:
        """Bring the cache up to `ids`, in chunks."""
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1
        new = ids[:, self.cache.get_seq_length() :]
        for part in new.split(self.prefill_chunk, dim=1):
            if part.shape[1]:
                self.model(part, past_key_values=self.cache, use_cache=True, **options)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._take(text)
