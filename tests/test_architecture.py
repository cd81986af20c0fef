"""The house: an import never points up (docs: CONTRIBUTING, "The house")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rosakit

ROOT = Path(rosakit.__file__).parent
FLOORS = [
    {"errors", "files", "types", "symbols", "native", "cuda", "pipeline"},
    {"ops"},
    {"layers"},
    {"models", "tuning"},
    {"evaluate"},
    {"report"},
    {"cli", "demo"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name != "__init__.py")


def imported(path: Path):
    """Top-level parts of rosakit that a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module]
            if node.module == "rosakit":
                names = [f"rosakit.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "rosakit" and len(parts) > 1:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_points_up(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in FLOOR, f"{own} has no floor: give it one in FLOORS and in CONTRIBUTING"
    for line, target in imported(path):
        if target in FLOOR:
            assert FLOOR[target] <= FLOOR[own], f"{path.name}:{line} imports {target} from {own}"


def test_core_import_needs_torch_and_numpy_only():
    code = (
        "import sys, rosakit, rosakit.ops, rosakit.native, rosakit.layers\n"
        "heavy = ['transformers', 'peft', 'datasets', 'accelerate', 'typer', 'matplotlib', "
        "'triton', 'cuda']\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
