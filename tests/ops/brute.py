"""Semantics section 2 and 3.1 as quantifiers over pairs: slower than the oracle, and independent.

Plain Python on lists; shares no line with the package.
"""

from __future__ import annotations


def lcs(q, k, i, j):
    length = 0
    while length <= min(i, j) and q[i - length] == k[j - length]:
        length += 1
    return length


def best(q, k, i, candidates, max_length=None, min_length=1):
    """(j, length) of the longest, then latest candidate; (None, 0) for null."""
    scored = []
    for j in candidates:
        length = lcs(q, k, i, j)
        if max_length is not None:
            length = min(length, max_length)
        if length >= min_length:
            scored.append((length, j))
    if not scored:
        return None, 0
    length, j = max(scored)
    return j, length


def match_tokens(q, k, *, bits=0, max_length=None, min_length=1):
    """Positions, lengths and flipped positions of one stream."""
    position, length, flipped = [], [], []
    for i in range(len(q)):
        j, size = best(q, k, i, range(i), max_length, min_length)
        position.append(-1 if j is None else j + 1)
        length.append(size)
        row = []
        for bit in range(bits):
            other = [*q[:i], q[i] ^ (1 << bit)]
            j, _ = best(other, k, i, range(i), max_length, min_length)
            row.append(-1 if j is None else j + 1)
        flipped.append(row)
    return position, length, flipped


def collapse(x):
    """Runs as (start, symbol)."""
    return [(i, s) for i, s in enumerate(x) if i == 0 or x[i - 1] != s]


def match_runs(q, k, *, successor="available", bits=0, max_length=None, min_length=1):
    """Run granularity: everything is recomputed from the prefixes at every position."""
    position, length, flipped = [], [], []
    for i in range(len(q)):
        query = [s for _, s in collapse(q[: i + 1])]
        keys = collapse(k[: i + 1])
        symbols = [s for _, s in keys]
        rcap = len(keys) - 1
        candidates = range(rcap) if successor == "available" else range(rcap + 1)

        def read(query, symbols=symbols, candidates=candidates, keys=keys, rcap=rcap):
            e, size = best(query, symbols, len(query) - 1, candidates, max_length, min_length)
            if e is None or e + 1 > rcap:
                return -1, 0
            return keys[e + 1][0], size

        at, size = read(query)
        position.append(at)
        length.append(size)
        starts_run = i == 0 or q[i] != q[i - 1]
        flipped.append(
            [
                read([*query[:-1], query[-1] ^ (1 << bit)])[0] if starts_run else at
                for bit in range(bits)
            ]
        )
    return position, length, flipped
