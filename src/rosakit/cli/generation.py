"""What `rosakit generate` does with its flags: one turn, or a talk at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rosakit.tuning.conversation import Conversation, Sampling

__all__ = ["converse"]


def converse(
    talk: Conversation,
    text: str | None,
    sampling: Sampling,
    *,
    session: Path | None,
    stream: bool,
    memory: bool,
) -> None:
    """One turn with `text`, or turns from the terminal until it ends where there is none.

    Args:
        talk: a new conversation.
        text: the prompt, or None to ask for messages.
        sampling: how tokens are chosen.
        session: file to go on from, if it exists, and to save to after each turn.
        stream: write text as it is made.
        memory: report the decoding state's memory after each turn.
    """
    if session is not None and session.exists():
        talk.load(session)
    for prompt in [text] if text is not None else iter(_ask, None):
        assert prompt is not None
        write: Callable[[str], None] = _write if stream else _nothing
        answer = talk.turn(prompt, write, sampling)
        _write("\n" if stream else answer + "\n")
        if session is not None:
            talk.save(session)
        if memory:
            typer.echo(str(talk.memory or "memory is reported for models with rosakit"), err=True)


def _ask() -> str | None:
    """A message from the terminal; None at its end."""
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _nothing(piece: str) -> None:
    """Text that is written when it is complete."""
