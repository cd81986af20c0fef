"""RWKV's world tokenizer: greedy longest match over byte strings, from its published vocabulary.

The vocabulary file (``rwkv_vocab_v20230424.txt``) has a line a token: its id, a Python literal of
its text or bytes, and its length in bytes. Id 0 is not listed; models use it as end of text.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from pathlib import Path

from rosakit.errors import DataError, InvalidInputError

END_OF_TEXT = 0


class WorldTokenizer:
    """Bytes to token ids and back.

    Args:
        path: the published vocabulary file.

    Raises:
        DataError: the file is missing, or a line of it cannot be read.

    Example:
        >>> tokenizer = WorldTokenizer("rwkv_vocab_v20230424.txt")
        >>> tokenizer.decode(tokenizer.encode("The apple can be"))
        'The apple can be'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bytes: dict[int, bytes] = {}
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    self._add(number, line)
        except OSError as error:
            raise DataError(
                f"cannot read the vocabulary {self.path} ({error.strerror}); pass the path of "
                "RWKV's rwkv_vocab_v20230424.txt"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"the vocabulary {self.path} is not UTF-8 text: {error}") from error
        if not self._bytes:
            raise DataError(f"the vocabulary {self.path} is empty")
        self._ids = {text: token for token, text in self._bytes.items()}
        lengths: dict[bytes, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        # Candidates of a place are the lengths that occur after its two first bytes, longest first.
        self._lengths = {head: sorted(sizes, reverse=True) for head, sizes in lengths.items()}

    def _add(self, number: int, line: str) -> None:
        try:
            token, rest = line.split(" ", 1)
            literal, size = rest.rsplit(" ", 1)
            text = ast.literal_eval(literal.strip())
            data = text.encode() if isinstance(text, str) else text
            index = int(token)
            if not isinstance(data, bytes) or not data or len(data) != int(size):
                raise ValueError("the length does not fit the text")
            if index < 1 or index in self._bytes:
                raise ValueError("the id is not positive or occurs twice")
        except (ValueError, SyntaxError) as error:
            raise DataError(
                f"{self.path}, line {number}: expected an id, a quoted text and its length in "
                f"bytes, got {line.strip()[:60]!r} ({error})"
            ) from None
        self._bytes[index] = data

    def __len__(self) -> int:
        """Smallest number that is larger than every id."""
        return max(self._bytes) + 1

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text: at every place the longest token that fits.

        Raises:
            DataError: a byte has no token (the vocabulary lacks single bytes).
        """
        data = text.encode() if isinstance(text, str) else text
        ids, place = [], 0
        while place < len(data):
            for size in (*self._lengths.get(data[place : place + 2], ()), 1):
                token = self._ids.get(data[place : place + size])
                if token is not None:
                    break
            else:
                raise DataError(
                    f"byte {data[place]:#04x} at {place} has no token in {self.path}; the "
                    "vocabulary must hold every single byte"
                )
            ids.append(token)
            place += len(self._bytes[token])
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids; end of text gives none.

        Raises:
            InvalidInputError: an id that the vocabulary does not have.
        """
        try:
            return b"".join(self._bytes[int(i)] for i in ids if int(i) != END_OF_TEXT)
        except KeyError as error:
            raise InvalidInputError(f"token {error} is not in {self.path}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 come out as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
