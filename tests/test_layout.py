"""Imports go downwards only, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "antefix"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"benchmarks", "demo", "server"},
    {"doctor", "interop", "training", "merge", "link_prediction", "compose"},
    {"bank"},
    {"bulk"},
    {"generation", "labels", "self_study", "slot_attention"},
    {"choices", "frame_decoding"},
    {"batches"},
    {"attach", "condition"},
    {"attachment"},
    {"site_stack", "linear_stack", "weights_at_work", "shifted_positions", "inserted_tokens", "new_tokens"},
    {"encoder_rows"},
    {"at_work"},
    {"prefix", "stacking", "forward_call", "hidden_states", "passes"},
    {"methods"},
    {"parts"},
    {"rotary"},
    {"sites"},
    {"attention"},
    {"base"},
    {"quantised", "tasks", "accounting"},
    {"embedded", "fingerprint", "products", "data", "decoding", "metrics", "settings", "tensor_file", "generated_file"},
    {"atomic", "digest", "growing_file", "hooks", "pace", "processes", "strict_json"},
    {"errors"},
]
"""From the top down: a piece may import what stands below it, or beside it in its own package."""


def piece_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def layer_of(piece: str) -> int:
    found = [n for n, layer in enumerate(LAYERS) if piece in layer]
    assert len(found) == 1, f"'{piece}' has no layer of its own in LAYERS"
    return found[0]


def imports_of(source: str) -> set[str]:
    """The pieces of antefix that a file imports, wherever in it and in whatever way."""
    paths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say from where: `from antefix.x import y`"
            paths += [f"{node.module}.{alias.name}" for alias in node.names]
    found = {path.split(".")[1] for path in paths if path.startswith("antefix.")}
    return found | ({"antefix"} if "antefix" in paths else set())


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]
IMPORTS = {path: imports_of(path.read_text(encoding="utf-8")) for path in FILES}

BESIDE = {("metrics", "data")}
"""Exceptions, each with its reason. Scores read a table's fields and a data file's references."""


def goes_down(here: str, other: str) -> bool:
    return other == here or layer_of(other) > layer_of(here)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("from antefix import bank, sites as s", {"bank", "sites"}),
        ("from antefix.training.loop import StepReport", {"training"}),
        ("import antefix.cli, os", {"cli"}),
        ("import antefix.training.run as run", {"training"}),
        ("def later():\n    import antefix.cli.demo", {"cli"}),
        ("import antefix", {"antefix"}),
        ("import os.path\nfrom torch import nn\nimport antefix_tools.x", set()),
    ],
)
def test_every_form_of_import_is_seen(statement: str, found: set[str]) -> None:
    assert imports_of(statement) == found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards(path: Path) -> None:
    here = piece_of(path)
    for other in IMPORTS[path]:
        assert goes_down(here, other) or (here, other) in BESIDE, f"{here} must not import {other}"


def test_no_layer_and_no_exception_outlives_its_use() -> None:
    assert {piece for layer in LAYERS for piece in layer} == {piece_of(path) for path in FILES}
    used = {(piece_of(path), other) for path, imports in IMPORTS.items() for other in imports}
    assert {pair for pair in used if not goes_down(*pair)} == BESIDE


def test_data_and_metrics_know_nothing_of_prefixes() -> None:
    for path in FILES:
        if piece_of(path) in ("data", "metrics"):
            assert IMPORTS[path] <= {"data", "metrics", "errors", "atomic", "settings"}, path


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['antefix', '--help']\n"
        "from antefix.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'datasets', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_modules_and_functions_stay_small() -> None:
    """A module has at most 400 lines, what a function does at most 60 (signatures and docstrings left out)."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                assert (node.end_lineno or 0) - first.lineno < 60, f"{path}: {node.name}"
