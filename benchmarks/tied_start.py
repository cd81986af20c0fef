"""Does a tied start give better addresses? Agreement at the retrieved position, before training.

Attaches adapters to a pretrained model with q and k started tied and untied, reads held-out text
once, and reports what the matches point at: how often the key token equals the query token, and
how often the token read is the one that follows. Both should be far above chance for retrieval to
have anything to build on.

    python -m benchmarks.tied_start --model path/to/model.gguf --text file.py [file.py ...] \
        --output docs/results/tied_start.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from rosakit.evaluate import describe_environment
from rosakit.symbols import pack
from rosakit.tuning import RosaConfig, adapters_of, attach, detach, record_matches
from rosakit.tuning.health import match_health, mean_health, symbol_health
from rosakit.tuning.sources import load_model


def measure(model, ids: torch.Tensor, tied: bool, layers: tuple[int, ...], seed: int) -> dict:
    """Health of the adapters' matches, averaged over layers and texts."""
    torch.manual_seed(seed)
    attach(model, RosaConfig(window=256, sink_tokens=4, layers=layers, tied_start=tied))
    symbols: list[dict[str, float]] = []

    def keep_symbols(module, args, output):
        symbols.append(symbol_health(pack(output, module.rosa_bits), module.rosa_bits))

    handles = []
    for adapter in adapters_of(model).values():
        adapter.q_proj.rosa_bits = adapter.bits
        handles.append(adapter.q_proj.register_forward_hook(keep_symbols))
    rows = []
    with torch.no_grad(), record_matches(model) as contexts:
        for row in ids:
            model(input_ids=row[None], use_cache=False, logits_to_keep=1)
        for context, row in zip(contexts, ids, strict=True):
            for match in context.matches.values():
                rows.append(match_health(match, row[None], window=256))
    for handle in handles:
        handle.remove()
    detach(model)
    return mean_health(rows) | mean_health(symbols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="local folder, GGUF file or hub name")
    parser.add_argument("--text", required=True, nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model, dtype="float32")
    rows = [tokenizer(path.read_text())["input_ids"][: options.length] for path in options.text]
    short = [p.name for p, row in zip(options.text, rows, strict=True) if len(row) < options.length]
    if short:
        parser.error(f"fewer than {options.length} tokens in {', '.join(short)}")
    ids = torch.tensor(rows)
    result = {
        "command": "python -m benchmarks.tied_start",
        "environment": dataclasses.asdict(describe_environment()),
        "length": options.length,
        "layers": options.layers,
        "texts": [path.name for path in options.text],
        "seeds": list(range(options.seeds)),
    }
    names = ("key_token", "next_token", "match_rate", "match_length", "entropy", "entropy_worst")
    print(f"{'':10}" + "".join(f"{name:>15}" for name in names))
    for label, tied in (("tied", True), ("untied", False)):
        runs = [measure(model, ids, tied, tuple(options.layers), s) for s in range(options.seeds)]
        result[label] = runs
        means = {name: sum(run[name] for run in runs) / len(runs) for name in names}
        print(f"{label:10}" + "".join(f"{means[name]:15.3f}" for name in names))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
