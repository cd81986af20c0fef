"""What addresses that nothing trains point at, on held-out source code; no model is run.

    python -m benchmarks.addresses.coverage --model SmolLM2-135M-Instruct.Q4_1.gguf \
        --json docs/results/address_coverage.json

Counted at positions from 1024 on: how often an address finds something (`rate`), how often what it
reads is the token that follows (`hit`, of those that find something), and how much of what it reads
lies beyond the window (`beyond`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.addresses.data import blocks_of_code
from rosakit.evaluate import describe_environment
from rosakit.layers.hashing import context_codes, token_windows
from rosakit.layers.token_match import best_successors, distant_match
from rosakit.ops import suffix_match
from rosakit.tuning.sources import load_tokenizer

START = 1024


def describe(ids: Tensor, position: Tensor, window: int) -> tuple[dict[str, float], Tensor]:
    """Shares at the positions that count, and where the read token is right, bool ``[B, T]``."""
    own = torch.arange(ids.shape[1])
    counted = ((own >= START) & (own < ids.shape[1] - 1)).expand_as(ids)
    found = position >= 0
    read = ids.gather(1, position.clamp(min=0).to(torch.int64))
    right = found & (read == torch.roll(ids, -1, 1)) & counted
    matched = found & counted
    count = matched.sum().clamp(min=1)
    return {
        "rate": float(matched.sum() / counted.sum()),
        "hit": float(right.sum() / count),
        "beyond": float((matched & (own - position >= window)).sum() / count),
        "right": float(right.sum() / counted.sum()),
    }, right


def measure(ids: Tensor, window: int) -> list[dict[str, object]]:
    """One row an address."""
    rows: list[dict[str, object]] = []
    best = best_successors(ids, 4).position
    any_right = torch.zeros_like(ids, dtype=torch.bool)
    for rank in range(4):
        values, right = describe(ids, best[..., rank], window)
        any_right |= right
        share = float(any_right.sum() / ((ids.shape[1] - 1 - START) * len(ids)))
        rows.append(
            {"address": f"token match, candidate {rank + 1}", **values, "any_so_far": share}
        )
    far, _ = describe(ids, distant_match(ids, window).position[:, 0], window)
    rows.append({"address": f"token match at least {window} back", **far})
    for bits, orders, least in ((8, (1, 2, 3, 4, 6, 8), 2), (4, (1,), 1), (6, (1,), 3)):
        codes = context_codes(
            token_windows(ids, max(orders)), orders, routes=len(orders), bits=bits
        )
        position = suffix_match(codes, codes, min_length=least).position
        for route, order in enumerate(orders):
            values, _ = describe(ids, position[:, route], window)
            name = f"{bits}-bit hash of {order} tokens, {least} alike in a row"
            rows.append({"address": name, **values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="whose tokenizer is used")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--packages", nargs="*", default=["torch", "transformers"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    blocks = blocks_of_code(
        load_tokenizer(options.model),
        length=options.length,
        train=1,
        heldout=options.blocks,
        packages=options.packages,
    )
    rows = measure(blocks["heldout"].to(torch.int64), options.window)
    print("| address | finds something | right, of those | beyond the window | right, of all |")
    print("|---|---|---|---|---|")
    for row in rows:
        shares = [f"{100 * float(str(row[n])):.0f} %" for n in ("rate", "hit", "beyond", "right")]
        print(f"| {row['address']} | " + " | ".join(shares) + " |")
    if options.json:
        found = {
            "command": "python -m benchmarks.addresses.coverage",
            "environment": dataclasses.asdict(describe_environment()),
            "length": options.length,
            "blocks": len(blocks["heldout"]),
            "window": options.window,
            "files": blocks["files"]["heldout"],
            "rows": rows,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
