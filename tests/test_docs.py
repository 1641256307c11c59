"""The documentation is true: its examples run, its pages are linked, its lists are complete.

A page's python and bash examples run in order, in one folder, with a tiny model in the place of the embedded base.
`<!-- file: NAME -->` before a block writes it to that file; `<!-- not run: why -->` passes over it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_base
from typer.main import get_command
from typer.testing import CliRunner

import antefix
from antefix import embedded
from antefix.cli import app
from antefix.errors import AntefixError
from antefix.methods import METHODS
from antefix.metrics.tokens_ptb import have_java

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"(?:<!-- (file|not run): ([^>]*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NEEDS_JAVA = re.compile(r"meteor|rouge_l\b|cider")


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """(marker, its value, language, content)"""
    return [match.groups(default="") for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]  # type: ignore[misc]


def is_run(marker: str, language: str, content: str) -> bool:
    return marker != "not run" and (language == "python" or (language == "bash" and "antefix " in content))


EXECUTED = [
    page
    for page in PAGES
    if page.name != "commands.md" and any(is_run(marker, word, text) for marker, _, word, text in blocks(page))
]


def test_the_pages_have_examples() -> None:
    assert {"README.md", "guide.md", "python.md", "data.md", "metrics.md", "bank.md"} <= {p.name for p in EXECUTED}


@pytest.mark.parametrize("page", EXECUTED, ids=lambda p: p.name)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / "bases" / embedded.NAME
    base = tiny_base("llama")
    base.model.save_pretrained(home)
    base.tokenizer.save_pretrained(home)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    names: dict[str, object] = {}
    for marker, value, language, content in blocks(page):
        if marker == "file":
            Path(value).write_text(content, encoding="utf-8")
        elif is_run(marker, language, content) and language == "python":
            exec(compile(content, str(page), "exec"), names)
        elif is_run(marker, language, content):
            for line in content.replace("\\\n", " ").splitlines():
                if line.startswith("antefix ") and (have_java() or not NEEDS_JAVA.search(line)):
                    run_command(line, page)


def run_command(line: str, page: Path) -> None:
    result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
    if isinstance(result.exception, AntefixError):
        pytest.fail(f"{page.name}: {line}: {result.exception}")
    assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT / "docs")) in navigation, f"{page.name} is not in mkdocs.yml"
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_command_page_is_what_the_commands_say() -> None:
    made = subprocess.run(
        [
            Path(sys.executable).with_name("typer"),
            *("antefix.cli", "utils", "docs", "--name", "antefix", "--title", "Commands"),
        ],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").strip() == made.strip(), "run `make docs`"


def test_every_command_is_in_the_guide_or_a_page_and_has_an_example() -> None:
    pages = "".join(p.read_text(encoding="utf-8") for p in PAGES if p.name != "commands.md")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for word, sub in getattr(command, "commands", {"": command}).items():
            words = f"antefix {name} {word}".strip()
            assert words in pages, f"no page shows `{words}`"
            assert "Example" in (sub.help or ""), f"`{words} --help` has no example"


def test_every_method_has_a_page() -> None:
    for name in METHODS:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_the_public_names_are_those_of_the_python_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("## All public names")[2]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert named == set(antefix.__all__)
    assert all(getattr(antefix, name) is not None for name in antefix.__all__)
    assert len(antefix.__all__) <= 26


def test_the_recipe_page_is_what_the_models_say() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_recipe_page.py"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").strip() == made.strip(), "run `make docs`"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "results.md"], ids=lambda page: page.name)
def test_figures_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in ("bare", "prefix"):
        found = json.loads((ROOT / "results" / "e2e_1000" / f"{name}.json").read_text(encoding="utf-8"))
        cells = [f"{found['scores'][metric]:.4f}" for metric in ("bleu", "nist", "meteor", "rouge_l", "cider")]
        cells += [f"{100 * found['fields']['missing_share']:.1f} %", f"{100 * found['fields']['added_share']:.2f} %"]
        assert f"| {' | '.join(cells)} |" in text
