"""Measuring what a training run achieved, against everything it has to be compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as _Folder
from typing import Any

from rosakit.errors import DataError, InvalidInputError
from rosakit.evaluate.environment import describe_environment
from rosakit.evaluate.needles import make_needles
from rosakit.evaluate.results import EvaluationResult, VariantResult
from rosakit.evaluate.scores import Progress
from rosakit.evaluate.suites import Plan, measure_variant
from rosakit.tuning.attach import attach, detach, is_attached, rosa_parameters
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.data import DataConfig, Document, read_documents
from rosakit.tuning.lora import lora_parameters
from rosakit.tuning.packing import tokenize
from rosakit.tuning.result import load_result, read_run
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.sources import load_model

__all__ = ["evaluate_runs"]

Path = str | os.PathLike[str]


def evaluate_runs(
    run: Path,
    *,
    control: Path | None = None,
    full: Path | None = None,
    base: str | None = None,
    sources: Sequence[str] | None = None,
    length: int = 2048,
    documents: int = 8,
    niah_lengths: Sequence[int] = (),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 2,
    suites: Sequence[str] = ("perplexity", "niah"),
    tasks: Sequence[str] = (),
    local: Mapping[str, str] | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    parts: Path | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure a run, its base model and its controls.

    Variants: "full" (the untrained model), "window" (no sinks), "window+sinks", "rosa" (the run),
    and where they are given "control" and "full+trained" (full attention, trained alike).

    Args:
        run: output folder of a training run.
        control: the same run without retrieval.
        full: a run with full attention, trained alike.
        base: base model to use instead of the one that the run names.
        sources: texts to measure; None for what the run held out.
        length: tokens measured of each document.
        documents: documents measured; the longest ones in tokens, since positions far back are the
            point.
        niah_lengths: lengths of the prompts of all recall tasks in tokens; empty leaves them out.
        depths: where needles stand; see `rosakit.evaluate.niah`.
        samples: prompts a cell.
        suites: what is measured, names from `rosakit.evaluate.suites.SUITES`.
        tasks: tasks of lm-eval, measured if "tasks" is among the suites.
        local: by task a local file with its data.
        limit: at most so many documents, prompts a cell and documents a task; None for no limit.
        seed: of everything random.
        parts: folder that keeps what is finished, so that an interrupted evaluation goes on.
        dtype: see `rosakit.tuning.sources.load_model`; None for the run's own.
        device: where to compute; None for the run's own.
        progress: called as ``progress(what, done, total)``.

    Raises:
        CheckpointError: a folder that is no result, or a corrupt one.
        DataError: no held-out text; texts that the run trained on are left out.
        InvalidInputError: a run without a window, sizes out of range, a control that retrieves, or
            a run to compare with that was not trained alike (the message names what differs).
    """
    began = time.perf_counter()
    config = read_run(run)
    window = _window(run, config)
    if length < 2 or documents < 1:
        raise InvalidInputError(
            f"evaluation needs length >= 2 and documents >= 1, got {length} and {documents}"
        )
    if control is not None:
        other = read_run(control)
        if not _is_control(other):
            raise InvalidInputError(
                f"{control} retrieves, so it is no control; train it with the same settings and "
                "--control"
            )
        _check_alike(run, config, control, other, may_differ=("control",))
    if full is not None:
        attention = ("rosa.window", "rosa.sink_tokens", "rosa.global_layers")
        _check_alike(run, config, full, read_run(full), may_differ=attention)
    texts, dropped = _texts(config, sources)
    options = {"base": base, "dtype": dtype, "device": device}
    plain, tokenizer = load_model(
        config.model if base is None else base,
        gguf_file=config.gguf_file if base is None else None,
        dtype=config.dtype if dtype is None else dtype,
        device=config.device if device is None else device,
    )
    longest = sorted((x for x in tokenize(texts, tokenizer) if len(x) > 1), key=len, reverse=True)
    count = documents if limit is None else min(documents, limit)
    rows = [ids[:length].tolist() for ids in longest[:count]]
    sinks = config.rosa.sink_tokens if config.rosa is not None else 0
    folders = {"rosa": run, "control": control, "full+trained": full}
    plan = Plan(
        {"held-out text": rows},
        window,
        sinks,
        length,
        suites=tuple(suites),
        lengths=tuple(niah_lengths),
        depths=tuple(depths),
        samples=samples,
        # Words to hide needles in, without tokenising everything.
        haystack=_haystack(texts, max(niah_lengths)) if niah_lengths else None,
        tasks=tuple(tasks),
        local=dict(local or {}),
        limit=limit,
        seed=seed,
    )
    if niah_lengths:
        # Before anything is measured: what is wrong with the grid shows here.
        make_needles(tokenizer, niah_lengths, depths, samples=1, haystack=plan.haystack)

    def measure(name: str, variant: Any, trained: int, description: str) -> VariantResult:
        def report(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{name}: {what}", done, total)

        return measure_variant(
            variant,
            tokenizer,
            plan,
            trained=trained,
            description=description,
            parts=None if parts is None else _part(parts, name, folders.get(name), options),
            progress=report,
        )

    measured = {}
    for name, variant, trained, description in _variants(plain, config, window, folders, options):
        measured[name] = measure(name, variant, trained, description)
        del variant  # before the next one is loaded
    order = ("full", "full+trained", "window", "window+sinks", "control", "rosa")
    return EvaluationResult(
        {name: measured[name] for name in order if name in measured},
        describe_environment(),
        seed,
        time.perf_counter() - began,
        {
            "run": os.fspath(run),
            "model": config.model if base is None else base,
            "window": window,
            "sink_tokens": sinks,
            "length": length,
            "documents": len(rows),
            "training_texts_left_out": dropped,
        },
    )


def _part(parts: Path, name: str, folder: Path | None, options: Mapping[str, Any]) -> _Folder:
    """Where the finished suites of a variant are kept: elsewhere for other weights."""
    known = dict(options)
    if folder is not None:
        metrics = _Folder(folder) / "metrics.json"
        known |= {"folder": os.fspath(folder), "trained": metrics.stat().st_mtime_ns}
    digest = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()[:12]
    return _Folder(parts) / f"{name}-{digest}"


def _variants(
    base: Any,
    config: TuneConfig,
    window: int,
    runs: dict[str, Path | None],
    options: dict[str, Any],
) -> Iterator[tuple[str, Any, int, str]]:
    """(name, model, trained parameters, description), one model in memory beside the base."""
    yield "full", base, 0, "full attention, untrained"
    assert config.rosa is not None
    bare = RosaConfig(
        window=window, sink_tokens=0, adapters=False, global_layers=config.rosa.global_layers
    )
    for name, sinks in (("window", 0), ("window+sinks", config.rosa.sink_tokens)):
        attach(base, dataclasses.replace(bare, sink_tokens=sinks))
        try:
            yield name, base, 0, f"window of {window} tokens and {sinks} sinks, untrained"
        finally:
            detach(base)
    for name, folder in runs.items():
        if folder is not None:
            loaded, _, run = load_result(folder, **options)
            yield name, loaded, _count_trained(loaded), _describe(run)
            del loaded


def _count_trained(model: Any) -> int:
    added = rosa_parameters(model) if is_attached(model) else {}
    return sum(p.numel() for p in (*added.values(), *lora_parameters(model).values()))


def _describe(config: TuneConfig) -> str:
    rosa = config.attached()
    parts = ["full attention" if rosa is None or rosa.window is None else f"window {rosa.window}"]
    if rosa is not None and rosa.token_route:
        parts.append("token route")
    if rosa is not None and rosa.recall:
        parts.append(f"{rosa.recall} recalled spans")
    if rosa is not None and rosa.adapters:
        parts.append(f"adapters with {rosa.address} addresses")
    if config.lora_rank:
        parts.append(f"LoRA of rank {config.lora_rank}")
    if _is_control(config):
        parts.append("nothing retrieved")
    return ", ".join(parts)


def _is_control(config: TuneConfig) -> bool:
    rosa = config.attached()
    if rosa is None or not rosa.retrieve:
        return True
    return not (rosa.adapters or rosa.token_route or rosa.recall)


def _window(run: Path, config: TuneConfig) -> int:
    if config.rosa is None or config.rosa.window is None:
        raise InvalidInputError(
            f"{os.fspath(run)} was trained without a window, so there is nothing to compare; give "
            "it as the run with full attention beside one with a window"
        )
    return config.rosa.window


_KEEPING = (
    "output",
    "device",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "eval_blocks",
    "resume",
)
"""Settings of a run that do not change what is trained."""


def _check_alike(
    run: Path, config: TuneConfig, folder: Path, other: TuneConfig, *, may_differ: Sequence[str]
) -> None:
    """A comparison is worth its name only between runs that were trained alike."""
    ours, theirs = (_flat(c.to_dict()) for c in (config, other))
    skipped = {*_KEEPING, *may_differ}
    different = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in skipped and ours.get(name) != theirs.get(name)
    )
    if different:
        told = "; ".join(f"{n}: {ours.get(n)} and {theirs.get(n)}" for n in different[:5])
        raise InvalidInputError(
            f"{os.fspath(folder)} was not trained like {os.fspath(run)} ({told}); train it again "
            "with the same settings"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _haystack(texts: Sequence[Document], length: int) -> str:
    """Enough words for needles of `length` tokens, without tokenising everything."""
    return "\n".join(t.text for t in texts)[: 64 * length]


def _texts(config: TuneConfig, sources: Sequence[str] | None) -> tuple[list[Document], int]:
    """What to measure, and how many texts were left out because the run trained on them."""
    if sources is not None:
        data = DataConfig(
            sources=tuple(sources),
            heldout_share=0.0,
            column=config.data.column,
            extensions=config.data.extensions,
        )
        named = read_documents(data).train
        trained: set[str] = set()
        if config.data.sources:
            trained = {document.text for document in read_documents(config.data).train}
        found = [document for document in named if document.text not in trained]
        if not found:
            raise DataError(
                f"the run trained on all {len(named)} texts that were named; name others, or leave "
                "them out to measure what the run held out"
            )
        return found, len(named) - len(found)
    if not config.data.sources:
        raise DataError("the run was given its texts in memory; name texts to measure with data")
    found = read_documents(config.data).heldout
    if not found:
        raise DataError("the run held out no text; name texts to measure with data")
    return found, 0
