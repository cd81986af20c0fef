"""Symbol streams on which automata and matchers go wrong or slow, by name."""

from __future__ import annotations

import numpy as np


def fibonacci(length: int) -> np.ndarray:
    a, b = [0], [0, 1]
    while len(b) < length:
        a, b = b, b + a
    return np.array(b[:length])


def thue_morse(length: int) -> np.ndarray:
    return np.array([bin(i).count("1") & 1 for i in range(length)])


def de_bruijn(alphabet: int, length: int) -> np.ndarray:
    """Greedy (prefer-largest) de Bruijn-like sequence: every short word once before any twice."""
    order = max(1, int(np.ceil(np.log(max(length, 2)) / np.log(alphabet))))
    seen: set[tuple[int, ...]] = set()
    out = [0] * order
    while len(out) < length + order:
        for symbol in range(alphabet - 1, -1, -1):
            word = (*out[len(out) - order + 1 :], symbol)
            if word not in seen:
                seen.add(word)
                out.append(symbol)
                break
        else:
            out.append(0)
    return np.array(out[:length])


def markov_with_copies(rng: np.random.Generator, length: int, alphabet: int) -> np.ndarray:
    """Second-order Markov chain into which earlier passages are copied."""
    table = rng.dirichlet(np.full(alphabet, 0.3), size=(alphabet, alphabet))
    out = list(rng.integers(0, alphabet, size=2))
    while len(out) < length:
        if len(out) > 16 and rng.random() < 0.05:
            start = int(rng.integers(0, len(out) - 8))
            out.extend(out[start : start + int(rng.integers(4, 64))])
        else:
            out.append(int(rng.choice(alphabet, p=table[out[-2], out[-1]])))
    return np.array(out[:length])


FAMILIES = (
    "random",
    "constant",
    "period2",
    "period3",
    "fibonacci",
    "thue_morse",
    "de_bruijn",
    "markov",
    "repeats",
    "doubled",
    "tail_break",
)


def make(name: str, length: int, alphabet: int, seed: int = 0) -> np.ndarray:
    """Stream `name` of the given length over ``0..alphabet-1`` as int64."""
    rng = np.random.default_rng(seed)
    positions = np.arange(length)
    if name == "random":
        out = rng.integers(0, alphabet, size=length)
    elif name == "constant":
        out = np.full(length, alphabet - 1)
    elif name == "period2":
        out = positions % 2
    elif name == "period3":
        out = positions % 3
    elif name == "fibonacci":
        out = fibonacci(length)
    elif name == "thue_morse":
        out = thue_morse(length)
    elif name == "de_bruijn":
        out = de_bruijn(alphabet, length)
    elif name == "markov":
        out = markov_with_copies(rng, length, alphabet)
    elif name == "repeats":
        block = rng.integers(0, alphabet, size=max(1, length // 5))
        out = np.tile(block, 6)[:length]
    elif name == "doubled":
        out = np.repeat(rng.integers(0, alphabet, size=length), 2)[:length]
    elif name == "tail_break":
        out = np.where(positions == length - 1, 1, 0)
    else:
        raise ValueError(name)
    return (out % alphabet).astype(np.int64)
