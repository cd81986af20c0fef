"""Generating text from a model, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from rosakit.errors import InvalidInputError

__all__ = ["stream_text"]


def stream_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    chat: bool = False,
) -> str:
    """Continue a prompt.

    Args:
        model: a causal language model, attached or not.
        tokenizer: its tokenizer.
        prompt: text to continue; with `chat`, what the user says.
        write: called with each new piece of text.
        max_new_tokens: at most this many tokens.
        temperature: 0 always takes the most probable token.
        top_p: sample from the most probable tokens that together have this probability.
        top_k: sample from this many tokens; 0 for all.
        seed: makes sampling repeatable; None for a different text each time.
        chat: wrap the prompt in the tokenizer's chat template.

    Returns:
        The whole continuation.

    Raises:
        InvalidInputError: an empty prompt, a setting out of range, or no chat template.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise InvalidInputError(
            "generation needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= "
            f"0; got {max_new_tokens}, {temperature}, {top_p} and {top_k}"
        )
    ids = _encode(tokenizer, prompt, chat).to(model.device)
    if seed is not None:
        set_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        write(text)

    pad = tokenizer.pad_token_id
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            streamer=_Pieces(tokenizer, take),
            **options,
        )
    return "".join(pieces)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if not prompt:
        raise InvalidInputError("the prompt is empty; give some text to continue")
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInputError("the tokenizer has no chat template; leave out chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise InvalidInputError("the tokenizer made no token of the prompt; give another text")
    found: torch.Tensor = ids.to(torch.int64)
    return found


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._take(text)
