"""Public tasks through lm-eval, on a model object: short-context sets, RULER, LongBench.

Tasks are named as lm-eval names them and download their data where there is a network. A local
file of the same format takes a task's place of data anywhere (`local`), and RULER's
``niah_single_1`` generates its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosakit.errors import DataError, InvalidInputError
from rosakit.evaluate.scores import evaluating

__all__ = ["RULER", "SHORT_CONTEXT", "harness"]

SHORT_CONTEXT = ("hellaswag", "lambada_openai", "piqa", "sciq", "winogrande", "mmlu")
"""Tasks that fit into a window: what a memory must not cost."""

RULER = "niah_single_1"
"""RULER's task that needs no download."""

_LOCAL = "local data of "
"""Begins the names of the groups that wrap tasks with a local file."""

_METRICS = ("acc", "exact_match", "score", "qa_f1_score", "rouge_score", "f1")
"""What stands for a task, the first that it reports; else its first number."""


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    local: Mapping[str, str | os.PathLike[str]] | None = None,
    lengths: Sequence[int] = (4096,),
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Score a model on tasks of lm-eval.

    Args:
        model: a causal language model, attached or not.
        tokenizer: its tokenizer.
        tasks: names of lm-eval; groups such as "mmlu" or "longbench" count as one.
        local: by name of a task a ``.jsonl`` or ``.json`` file with its columns, which replaces
            the data that it would download.
        lengths: tokens of RULER's prompts.
        limit: documents a task; None for all.
        batch_size: requests a forward pass.
        seed: of everything random.

    Returns:
        By task (RULER: ``task/length``) its accuracy, or the score that it reports instead.

    Raises:
        InvalidInputError: lm-eval is not installed, no tasks, or a name that it does not know.
        DataError: data that can neither be found locally nor downloaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"public tasks need lm-eval ({error}); install it with: pip install 'rosakit[eval]'"
        ) from error
    if not tasks:
        raise InvalidInputError("no tasks: name at least one, such as hellaswag")
    name = getattr(tokenizer, "name_or_path", "")
    metadata = {"max_seq_lengths": list(lengths), "tokenizer": name, "pretrained": name}
    manager = TaskManager(metadata=metadata)
    files = dict(local or {})
    known = set(manager.all_tasks)
    unknown = [task for task in (*tasks, *files) if task not in known]
    if unknown:
        raise InvalidInputError(
            f"lm-eval knows no task named {', '.join(unknown)}; see lm-eval ls tasks"
        )
    wanted = [_with_file(task, files.get(task)) for task in tasks]
    with _quiet_nltk(), _tokenizer_at(tokenizer, tasks) as place, evaluating(model):
        if place is not None:
            metadata |= {"tokenizer": place, "pretrained": place}
            manager = TaskManager(metadata=metadata)
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=wanted,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                metadata=metadata,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except ImportError as error:
            raise InvalidInputError(f"a task needs more packages: {error}") from error
        except (ConnectionError, OSError) as error:
            raise DataError(
                f"the data of {', '.join(tasks)} can neither be downloaded nor found in the cache "
                f"({str(error).splitlines()[0]}); name local files of the same format with local"
            ) from error
    assert found is not None
    groups = found.get("groups") or {}
    subtasks = {s for names in (found.get("group_subtasks") or {}).values() for s in names}
    scores: dict[str, float] = {}
    for task, values in {**found["results"], **groups}.items():
        if task.startswith(_LOCAL) or (task in subtasks and task not in tasks):
            continue
        scores |= _scores(task, values, lengths)
    return scores


def _with_file(task: str, file: str | os.PathLike[str] | None) -> Any:
    """The task, with its data replaced by a local file where one is given."""
    if file is None:
        return task
    path = Path(file)
    if not path.is_file():
        raise DataError(f"no such file: {path}, given as the data of {task}")
    splits = ("train", "validation", "test", "dev")
    # A group of one, because only members of groups take over what they do not override.
    member = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        # Whatever split the task asks for is this file.
        "dataset_kwargs": {"data_files": {split: str(path) for split in splits}},
    }
    return {"group": f"{_LOCAL}{task}", "task": [member]}


def _scores(task: str, values: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, float]:
    numbers = {
        name.split(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not name.startswith(("sample_", "alias"))
        and "_stderr" not in name
    }  # fmt: skip
    by_length = {str(n): numbers[str(n)] for n in lengths if str(n) in numbers}
    if by_length:
        # RULER reports -1 for lengths that it was not asked for.
        return {f"{task}/{length}": value for length, value in by_length.items() if value >= 0}
    for metric in _METRICS:
        if metric in numbers:
            return {task: numbers[metric]}
    return {task: next(iter(numbers.values()))} if numbers else {}


@contextmanager
def _tokenizer_at(tokenizer: Any, tasks: Sequence[str]) -> Iterator[str | None]:
    """RULER loads the tokenizer by name once more: a folder with it, if any task is of RULER."""
    if not any(task.startswith(("niah", "ruler")) for task in tasks):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield folder


@contextmanager
def _quiet_nltk() -> Iterator[None]:
    """RULER's import downloads a sentence splitter unless a folder of its name exists."""
    before = os.environ.get("NLTK_DATA")
    with tempfile.TemporaryDirectory() as folder:
        if before is None:
            (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
            os.environ["NLTK_DATA"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["NLTK_DATA"]
