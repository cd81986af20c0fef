"""The inputs: seeded streams (q, k) of uint8 symbols by family name."""

from __future__ import annotations

import bisect
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.uint8]


def markov(n: int, alphabet: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Second-order Markov text with copied passages of 20 to 200 symbols."""
    width = min(alphabet, 16)  # successors that a context has
    table = rng.dirichlet(np.full(width, 0.3), size=(alphabet, alphabet)).cumsum(-1).tolist()
    shift = rng.integers(0, alphabet, (alphabet, alphabet)).tolist()
    draws, copies = rng.random(n).tolist(), rng.random(n) < 0.01
    out: list[int] = []
    while len(out) < n:
        i = len(out)
        if i > 200 and copies[i]:
            source = int(rng.integers(0, i - 1))
            out.extend(out[source : source + int(rng.integers(20, 200))])
            continue
        a, b = out[-2:] if i > 1 else (0, 0)
        drawn = min(bisect.bisect(table[a][b], draws[i]), width - 1)
        out.append((drawn + shift[a][b]) % alphabet)
    return np.array(out[:n])


def fibonacci(n: int) -> NDArray[np.int64]:
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return np.array(b[:n])


def de_bruijn(n: int, order: int = 12) -> NDArray[np.int64]:
    """Binary, by the prefer-one rule."""
    seen = bytearray(1 << order)
    seen[0] = 1
    state, mask, word = 0, (1 << order) - 1, [0] * order
    for _ in range((1 << order) - 1):
        step = (state << 1 | 1) & mask
        state = step if not seen[step] else state << 1 & mask
        seen[state] = 1
        word.append(state & 1)
    return np.resize(np.array(word), n)


def _noisy(k: NDArray[np.int64], alphabet: int, rng: np.random.Generator) -> NDArray[np.int64]:
    flip = rng.random(len(k)) < 0.05
    return np.where(flip, rng.integers(0, alphabet, len(k)), k)


MIXED = ("fibonacci", "iid", "period7", "mk", "constant")


@lru_cache(maxsize=64)
def draw(family: str, n: int, bits: int, seed: int) -> tuple[Symbols, Symbols]:
    """One stream of a family (`FAMILIES`)."""
    rng = np.random.default_rng([seed, bits])
    alphabet = 2**bits
    root = int(n**0.5)
    makers = {
        "iid": lambda: rng.integers(0, alphabet, n),
        "mk": lambda: markov(n, alphabet, rng),
        "mk_self": lambda: markov(n, alphabet, rng),
        "constant": lambda: np.zeros(n, np.int64),
        "period2": lambda: np.resize([0, 1], n),
        "period2_noisy": lambda: np.resize([0, 1], n),
        "period7": lambda: np.resize(rng.integers(0, alphabet, 7), n),
        "fibonacci": lambda: fibonacci(n),
        "thue_morse": lambda: np.bitwise_count(np.arange(n)) & 1,
        "de_bruijn": lambda: de_bruijn(n),
        "sqrt_blocks": lambda: np.resize(np.r_[np.zeros(root, np.int64), 1], n),
        "runs": lambda: np.repeat(rng.integers(0, alphabet, n), rng.geometric(0.3, n))[:n],
        "ahead": lambda: rng.integers(0, alphabet, n),
        "one_mark": lambda: (np.arange(n) == n // 2).astype(np.int64),
        "binary": lambda: rng.integers(0, 2, n),
        "mixed": lambda: np.concatenate(
            [draw(f, n // 5 + 1, bits, seed)[1] for f in MIXED]
        )[:n].astype(np.int64),
    }  # fmt: skip
    k = makers[family]()
    q = {
        "iid": lambda: rng.integers(0, alphabet, n),
        "mk": lambda: _noisy(k, alphabet, rng),
        "period2_noisy": lambda: _noisy(k, alphabet, rng),
        "ahead": lambda: np.roll(k, -1),
        "one_mark": lambda: np.roll(k, 3),
    }.get(family, lambda: k)()
    return q.astype(np.uint8), k.astype(np.uint8)


def tokens(family: str, n: int, vocabulary: int, seed: int) -> NDArray[np.int32]:
    """Token ids ``[1, n]`` below `vocabulary`: `hub` (every other token is the same one) or `zipf`
    (the most frequent ones are followed by a part of all)."""
    rng = np.random.default_rng([seed, vocabulary])
    if family == "hub":
        out = rng.integers(1, vocabulary, n)
        out[::2] = 0
    else:
        out = np.minimum(np.exp(rng.random(n) * np.log(vocabulary)), vocabulary - 1)
    return out.astype(np.int32)[None]


FAMILIES = (
    "iid", "mk", "mk_self", "constant", "period2", "period2_noisy", "period7", "fibonacci",
    "thue_morse", "de_bruijn", "sqrt_blocks", "runs", "ahead", "one_mark", "binary", "mixed",
)  # fmt: skip


def batch(family: str, n: int, bits: int, routes: int) -> tuple[Symbols, Symbols]:
    """``[1, routes, n]``; at most eight different streams, repeated."""
    pairs = [draw(family, n, bits, seed) for seed in range(min(routes, 8))]
    order = [r % len(pairs) for r in range(routes)]
    q, k = (np.stack([pairs[r][side] for r in order])[None] for side in (0, 1))
    return q, k
