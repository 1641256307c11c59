"""What `docs/contributing.md` says of a new method, done to the letter: one file and one line of the table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOY = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8"), re.DOTALL)[0]
USE = """\
import antefix
from conftest import tiny_base, tell_sources, tiny_method
base = tiny_base("llama")
examples = [antefix.Example(source=f"name : N{n}", targets=(f"This is N{n}.",)) for n in range(12)]
training = antefix.TrainingRecipe(max_steps=6, pairs_per_step=6, evaluations=2)
prefix = antefix.train(base, examples, training=training, method="toy")
prefix.save("bank/toy")
with antefix.attached(base.model, antefix.Bank("bank")["toy"], tiny_method(base, "apt"), rows=[0, 1, -1]):
    tell_sources(base)
    print(len(antefix.generate(base, examples[:3], decoding=antefix.Decoding(max_new_tokens=3))))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of ours, with the toy in it."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    methods = tmp_path / "src" / "antefix" / "methods"
    (methods / "toy.py").write_text(TOY, encoding="utf-8")
    table = methods / "__init__.py"
    before, line, after = table.read_text(encoding="utf-8").partition("METHODS: dict[str, str] = {\n")
    table.write_text(f'{before}{line}    "toy": "antefix.methods.toy:Toy",\n{after}', encoding="utf-8")
    return tmp_path


def run(repository: Path, *words: str) -> str:
    paths = os.pathsep.join(str(repository / name) for name in ("src", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *words], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_one_file_and_one_line_are_enough_for_the_property_tests(repository: Path) -> None:
    files = [f"tests/{name}.py" for name in ("test_every_method", "test_attach", "test_layout")]
    said = run(repository, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "toy and (llama or bart)")
    assert " passed" in said
    assert int(said.rpartition(" passed")[0].rpartition("\n")[2].split()[-1]) > 15


def test_and_for_all_else(repository: Path) -> None:
    (row,) = [row for row in json.loads(run(repository, "-m", "antefix", "methods", "--json")) if row["name"] == "toy"]
    assert row["summary"] == "a value for every head"
    (repository / "use.py").write_text(USE, encoding="utf-8")
    assert run(repository, "use.py").split()[-1] == "3"
