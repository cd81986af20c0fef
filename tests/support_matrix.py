"""The support matrix: every architecture, attention implementation and feature, tried.

    python -m tests.support_matrix --write              # docs/results/support.json, docs/support.md
    python -m tests.support_matrix llama gemma2         # print some rows
    python -m tests.support_matrix --device cuda --out gpu.json

A cell says what happened when the feature ran on a tiny random model: "yes" after its numbers were
compared with the plain form, or the reason that rosakit gave for refusing. Nothing else is
allowed: an error that is not a refusal fails the run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import inspect
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import rosakit
from rosakit.errors import RosakitError
from rosakit.files import atomic_write
from rosakit.tuning import RosaConfig, attach, freeze_base, rosa_parameters
from tests.tuning.architectures import ARCHITECTURES, build_architecture

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "docs/results/support.json", ROOT / "docs/support.md"
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "no window")
FEATURES = ("attach", "cached", "padding", "train", "checkpointing", "compile")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
YES = "yes"


class Case:
    """One architecture under one attention implementation.

    Args:
        name: the architecture.
        implementation: one of `IMPLEMENTATIONS`.
        device: where it runs.
    """

    def __init__(self, name: str, implementation: str, device: str) -> None:
        self.name, self.implementation, self.device = name, implementation, device
        # FlexAttention serves chunks of at least a block of queries.
        self.length = 150 if implementation == "flex_attention" else 40

    def model(self) -> Any:
        """An attached model whose added parameters all matter."""
        own = None if self.implementation == "no window" else self.implementation
        loaded = own if own in ("sdpa", "eager", "flex_attention") else None
        model = build_architecture(self.name, implementation=loaded)
        if own is not None and loaded is None:
            model.config._attn_implementation = own  # its package need not be there to be refused
        config = RosaConfig(window=None if own is None else 8, sink_tokens=2, own_value=True)
        model = attach(model.to(self.device), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in rosa_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def ids(self, rows: int = 2) -> torch.Tensor:
        """Tokens of which suffixes repeat."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, 11, (rows, self.length), generator=generator).to(self.device)


def attached(case: Case) -> None:
    """It attaches and runs."""
    with torch.no_grad():
        case.model()(case.ids(), use_cache=False)


@torch.no_grad()
def cached(case: Case) -> None:
    """Whole sequence = chunks = token by token, and `generate` = a whole pass a token."""
    model, ids = case.model(), case.ids()
    whole = model(ids, use_cache=False).logits
    tail = 20
    for sizes in ([case.length], [case.length - tail, *[1] * tail]):
        parts, cache = [], None
        for part in ids.split(sizes, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)
    new = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    got, wanted = (model.generate(ids, use_cache=use, **new) for use in (True, False))
    assert torch.equal(got, wanted), "cached generation differs"


@torch.no_grad()
def padding(case: Case) -> None:
    """A left-padded batch gives what its rows give alone."""
    model, ids = case.model(), case.ids()
    short = ids[:1, : case.length - 13]
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    batch = torch.cat([ids[:1], torch.cat([torch.zeros_like(short[:, :13]), short], 1)])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = position
    new = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for use in (False, True):
        got = model(batch, use_cache=use, **options).logits
        for row, alone in ((0, ids[:1]), (1, short)):
            wanted = model(alone, use_cache=False).logits[0]
            torch.testing.assert_close(got[row][mask[row] != 0], wanted, **TOLERANCE)
    found = model.generate(batch, attention_mask=mask, **new)
    for row, alone in ((0, ids[:1]), (1, short)):
        wanted = model.generate(alone, **new)[0, alone.shape[1] :]
        assert torch.equal(found[row, case.length :], wanted), "padded generation differs"


def train(case: Case) -> None:
    """Every added parameter gets a finite gradient, and no other."""
    gradients(case, None)


def gradients(case: Case, checkpointing: bool | None) -> dict[str, torch.Tensor]:
    """Gradients of the added parameters."""
    model, ids = case.model(), case.ids()
    freeze_base(model)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    torch.manual_seed(5)
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = {}
    for name, parameter in rosa_parameters(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert bool(parameter.grad.isfinite().all()), f"{name} has a gradient that is not finite"
        found[name] = parameter.grad
    return found


def checkpointing(case: Case) -> None:
    """Both modes of gradient checkpointing give the gradients of plain training."""
    wanted = gradients(case, None)
    for reentrant in (True, False):
        got = gradients(case, reentrant)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, **TOLERANCE)


@torch.no_grad()
def compiles(case: Case) -> None:
    """A whole sequence is traced into one graph, with the same logits."""
    model, ids = case.model(), case.ids()
    wanted = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, **TOLERANCE)


CHECKS: dict[str, Callable[[Case], None]] = {
    "attach": attached,
    "cached": cached,
    "padding": padding,
    "train": train,
    "checkpointing": checkpointing,
    "compile": compiles,
}


def outcome(name: str, implementation: str, feature: str, device: str) -> str:
    """ "yes", or the reason of a refusal; raises what is neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CHECKS[feature](Case(name, implementation, device))
        except RosakitError as error:
            return f"refused: {error}"
        except torch._dynamo.exc.Unsupported as error:
            return f"no: torch.compile: {str(error).splitlines()[0]}"
        except ValueError as error:
            # What transformers itself refuses: an implementation, checkpointing.
            if "does not support" not in str(error):
                raise
            return f"no: {str(error).splitlines()[0]}"
    return YES


def rows(
    names: list[str],
    device: str,
    features: tuple[str, ...] = FEATURES,
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
    show: bool = False,
) -> dict[str, dict[str, dict[str, str]]]:
    """Outcomes by architecture, implementation and feature."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in names:
        for implementation in implementations:
            cells: dict[str, str] = {}
            for feature in features:
                refused = cells.get("attach", YES)
                begin = time.perf_counter()
                cells[feature] = (
                    refused if refused != YES else outcome(name, implementation, feature, device)
                )
                if show:
                    took = time.perf_counter() - begin
                    print(
                        f"{name} {implementation} {feature}: {cells[feature]} ({took:.1f} s)",
                        flush=True,
                    )
            found.setdefault(name, {})[implementation] = cells
    return found


def page(result: dict[str, Any], gpu: dict[str, Any] | None = None) -> str:
    """The documentation page."""
    lines = [
        "# Support matrix",
        "",
        "Written by `python -m tests.support_matrix --write` from runs of tiny random models; do",
        "not edit. A tick means that the feature ran and its numbers were compared:",
        "",
        "* **attach**: window, sinks and adapters, a whole sequence;",
        "* **cached**: whole sequence = chunked prefill = token by token, `generate()` = a whole",
        "  pass a token;",
        "* **padding**: a left-padded batch = its rows alone, forward and `generate()`;",
        "* **train**: finite gradients for every added parameter;",
        "* **checkpointing**: both modes give the gradients of plain training;",
        "* **compile**: `torch.compile(fullgraph=True)` of a whole sequence gives the same logits.",
        "",
        "A number is the reason why not, below.",
        "",
    ]
    reasons: list[str] = []

    def shown(cell: str) -> str:
        if cell == YES:
            return "✓"
        if cell not in reasons:
            reasons.append(cell)
        return f"({reasons.index(cell) + 1})"

    parts = [(result, name) for name in IMPLEMENTATIONS if name != "flex_attention"]
    parts.insert(2, (gpu or result, "flex_attention"))
    for source, implementation in parts:
        title = "without a window" if implementation == "no window" else f"`{implementation}`"
        lines += [f"## {title}, {source['device']}", ""]
        if not any(cells[implementation]["attach"] == YES for cells in source["rows"].values()):
            said = next(iter(source["rows"].values()))[implementation]["attach"]
            lines += [f"Refused for every architecture; the first says: {said}", ""]
            continue
        lines += ["| architecture | " + " | ".join(FEATURES) + " |", "|---" * 7 + "|"]
        for name, cells in source["rows"].items():
            marks = (shown(cells[implementation][feature]) for feature in FEATURES)
            lines.append(f"| {name} | " + " | ".join(marks) + " |")
        lines.append("")
    lines += ["## Reasons", ""]
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"Run on {result['date']} with {versions}.", ""]
    return "\n".join(lines)


def run(names: list[str], device: str, implementations: tuple[str, ...]) -> dict[str, Any]:
    """A result with its circumstances."""
    return {
        "what": "support matrix on tiny random models",
        "command": "python -m tests.support_matrix --write",
        "date": dt.date.today().isoformat(),
        "device": "GPU: " + torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows(names, device, implementations=implementations, show=True),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--implementation", action="append", choices=IMPLEMENTATIONS)
    parser.add_argument("--write", action="store_true", help="write result and page")
    parser.add_argument("--page", action="store_true", help="write the page from the result")
    parser.add_argument("--out", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.page:
        chosen = tuple(args.implementation or IMPLEMENTATIONS)
        result = run(args.names or list(ARCHITECTURES), args.device, chosen)
        out = RESULT if args.write else args.out
        if out is not None:
            atomic_write(out, json.dumps(result, indent=1) + "\n")
    if args.write or args.page:
        gpu = RESULT.with_name("support_gpu.json")
        made = page(
            json.loads(RESULT.read_text()), json.loads(gpu.read_text()) if gpu.exists() else None
        )
        atomic_write(PAGE, made)


if __name__ == "__main__":
    sys.exit(main())
