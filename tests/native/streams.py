"""Stream families that the core's tests draw from: random, copied, periodic and adversarial."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Stream = NDArray[np.int64]


def fibonacci(n: int) -> Stream:
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return np.array(b[:n])


def thue_morse(n: int) -> Stream:
    return np.array([bin(i).count("1") & 1 for i in range(n)])


def de_bruijn(n: int, order: int = 6) -> Stream:
    """A binary de Bruijn sequence of the order, repeated."""
    seen, word = {0}, [0] * order
    state, mask = 0, (1 << order) - 1
    for _ in range((1 << order) - order):
        state = (
            (state << 1 | 1) & mask if ((state << 1 | 1) & mask) not in seen else state << 1 & mask
        )
        seen.add(state)
        word.append(state & 1)
    return np.resize(np.array(word), n)


def copied(n: int, alphabet: int, rng: np.random.Generator, noise: float = 0.05) -> Stream:
    """Random text with copied passages and a little noise."""
    x = rng.integers(0, alphabet, n)
    at = max(4, n // 8)
    while at < n:
        length = int(rng.integers(2, max(3, n // 4)))
        source = int(rng.integers(0, at))
        length = min(length, n - at, at - source)
        if length > 0:
            x[at : at + length] = x[source : source + length]
        at += max(length, 1) + int(rng.integers(0, 6))
    flip = rng.random(n) < noise
    x[flip] = rng.integers(0, alphabet, int(flip.sum()))
    return x


def lagged(n: int, alphabet: int, rng: np.random.Generator) -> tuple[Stream, Stream]:
    """A query that runs a little ahead of, or behind, a (possibly doubled) copy of the keys."""
    k = rng.integers(0, alphabet, n)
    if rng.random() < 0.5:
        k = np.repeat(k, 2)[:n]
    if rng.random() < 0.5:
        k = np.resize(k[: max(2, n // 5)], n)
    return np.roll(k, int(rng.integers(-4, 5))), k


FAMILIES = (
    "random", "copied", "noisy", "constant", "period2", "period3", "blocks",
    "fibonacci", "thue_morse", "de_bruijn", "lagged", "mixed",
)  # fmt: skip


def draw(family: str, n: int, alphabet: int, seed: int) -> tuple[Stream, Stream]:
    """A pair (q, k) of `n` symbols below `alphabet` (at least 2)."""
    rng = np.random.default_rng(seed)
    if family == "random":
        return rng.integers(0, alphabet, n), rng.integers(0, alphabet, n)
    if family == "lagged":
        return lagged(n, alphabet, rng)
    if family == "mixed":
        parts = [
            draw(f, max(1, n // 5), alphabet, seed + 1) for f in rng.permutation(FAMILIES[:-1])
        ]
        return tuple(np.resize(np.concatenate([p[s] for p in parts]), n) for s in (0, 1))  # type: ignore[return-value]
    k = {
        "copied": lambda: copied(n, alphabet, rng),
        "noisy": lambda: copied(n, alphabet, rng),
        "constant": lambda: np.full(n, rng.integers(0, alphabet)),
        "period2": lambda: np.resize(rng.integers(0, alphabet, 2), n),
        "period3": lambda: np.resize(rng.integers(0, alphabet, 3), n),
        "blocks": lambda: np.repeat(rng.integers(0, alphabet, n), rng.integers(1, 9, n))[:n],
        "fibonacci": lambda: fibonacci(n),
        "thue_morse": lambda: thue_morse(n),
        "de_bruijn": lambda: de_bruijn(n),
    }[family]()
    q = k.copy()
    if family == "noisy" or rng.random() < 0.3:
        flip = rng.random(n) < 0.1
        q[flip] = rng.integers(0, alphabet, int(flip.sum()))
    return q, k
