"""The world tokenizer: greedy longest match, exact round trips, named faults."""

from __future__ import annotations

import random

import pytest

from rosakit.errors import DataError, InvalidInputError
from rosakit.models.rwkv8.tokenizer import WorldTokenizer

WORDS = ["th", "the", "there", " a", " ap", " apple", "\n\n", "é", "naïve", "的", "  ", "re"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Every byte, some words, and a token that is no UTF-8, in the published format."""
    texts = [bytes([b]) for b in range(256)] + [w.encode() for w in WORDS] + [b"\xe7\x9a"]
    lines = []
    for index, data in enumerate(sorted(set(texts), key=lambda t: (len(t), t)), 1):
        try:
            literal = repr(data.decode())
        except UnicodeDecodeError:
            literal = repr(data)
        lines.append(f"{index} {literal} {len(data)}\n")
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def greedy(tokenizer, data):
    """The definition: at every place the longest token of the vocabulary that fits."""
    out, place = [], 0
    known = {tokenizer.decode_bytes([i]): i for i in range(1, len(tokenizer))}
    while place < len(data):
        best = max((t for t in known if data.startswith(t, place)), key=len)
        out.append(known[best])
        place += len(best)
    return out


def test_round_trips_and_greedy(vocabulary):
    tokenizer = WorldTokenizer(vocabulary)
    rng = random.Random(0)
    pieces = [*WORDS, "t", "x", "\r", "\x85", "\u2028", "的确", "🙂"]
    for _ in range(100):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        ids = tokenizer.encode(text)
        assert ids == greedy(tokenizer, text.encode())
        assert tokenizer.decode(ids) == text
    noise = rng.randbytes(300)
    assert tokenizer.decode_bytes(tokenizer.encode(noise)) == noise
    assert len(tokenizer.encode("there")) == 1
    assert len(tokenizer) == 1 + 256 + len(WORDS) + 1


def test_end_of_text_and_broken_utf8(vocabulary):
    tokenizer = WorldTokenizer(vocabulary)
    assert tokenizer.decode([0, *tokenizer.encode("the"), 0]) == "the"
    assert tokenizer.decode(tokenizer.encode(b"\xff")) == "\ufffd"
    with pytest.raises(InvalidInputError, match="token 99999 is not in"):
        tokenizer.decode([99999])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("1 'a' 1\nnonsense\n", "line 2: expected an id"),
        ("1 'a' 2\n", "line 1.*length does not fit"),
        ("1 'a' 1\n1 'b' 1\n", "line 2.*occurs twice"),
        ("1 __import__('os') 1\n", "line 1"),
        ("1 'a' 1\n", "byte 0x62 at 1 has no token"),
    ],
)
def test_faults(text, message, tmp_path):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        WorldTokenizer(tmp_path / "v.txt").encode("ab")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"pass the path of RWKV's rwkv_vocab"):
        WorldTokenizer(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        WorldTokenizer(tmp_path / "b.txt")
