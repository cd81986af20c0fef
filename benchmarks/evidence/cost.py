"""What a context costs: full attention, the window, and the window with recalled spans.

python -m benchmarks.evidence.cost --model MODEL.gguf --text FILE --output cost.json
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from rosakit.evaluate import describe_environment, efficiency
from rosakit.evaluate.results import write_json
from rosakit.tuning import RosaConfig, attach, detach
from rosakit.tuning.sources import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill, decode and cache of several views.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="what is read, repeated as needed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--recall", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, dtype="auto", device=device)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    window = RosaConfig(window=options.window, adapters=False)
    variants = {
        "full": None,
        "window": dataclasses.replace(window, sink_tokens=0),
        "window+sinks": window,
        "recall": dataclasses.replace(window, recall=options.recall),
        "recall+route": dataclasses.replace(window, recall=options.recall, token_route=True),
    }
    found = {}
    for name, config in variants.items():
        if config is not None:
            attach(model, config)
        entries = efficiency(model, options.lengths, ids=ids, repeats=options.repeats)
        found[name] = [dataclasses.asdict(entry) for entry in entries]
        if config is not None:
            detach(model)
        for entry in entries:
            print(f"{name:14} {entry.length:6} tokens: prefill {entry.prefill_seconds:.2f} s, "
                  f"decode {entry.decode_ms:.1f} ms, cache {entry.cache_bytes / 2**20:.1f} MiB",
                  flush=True)  # fmt: skip
    environment = dataclasses.asdict(describe_environment())
    settings = {"window": options.window, "recall": options.recall, "text": options.text.name}
    write_json(options.output, {**environment, "settings": settings, "variants": found})


if __name__ == "__main__":
    main()
