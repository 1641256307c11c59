"""Imports go downwards only, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "antefix"

LAYERS = [
    {"cli"},
    {"benchmarks", "demo"},
    {"doctor", "interop", "training", "bank", "generated_file"},
    {"generation"},
    {"attach"},
    {"prefix"},
    {"methods"},
    {"parts"},
    {"rotary"},
    {"sites"},
    {"attention"},
    {"base"},
    {"embedded", "fingerprint", "data", "metrics", "settings", "tensor_file"},
    {"atomic", "pace", "strict_json"},
    {"errors"},
]
"""From the top down: a piece may import what stands below it, or beside it in its own package."""


def piece_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def layer_of(piece: str) -> int:
    return next(n for n, layer in enumerate(LAYERS) if piece in layer)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "antefix":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("antefix."):
            assert node.module is not None
            found.add(node.module.split(".")[1])
    return found


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards(path: Path) -> None:
    here = piece_of(path)
    for other in imports_of(path) - {here}:
        assert layer_of(other) > layer_of(here) or (here, other) in BESIDE, f"{here} must not import {other}"


BESIDE = {("metrics", "data"), ("doctor", "training"), ("demo", "training")}
"""Scores read a table's fields and a data file's references."""


def test_data_and_metrics_know_nothing_of_prefixes() -> None:
    for path in FILES:
        if piece_of(path) in ("data", "metrics"):
            assert imports_of(path) <= {"data", "metrics", "errors", "atomic", "settings"}, path


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['antefix', '--help']\n"
        "from antefix.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_modules_stay_small() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
