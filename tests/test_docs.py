"""The documentation is true: its examples run, its pages are linked, its lists are complete.

A page's python and bash examples run in order, in one folder, with a tiny model in the place of the embedded base.
`<!-- file: NAME -->` before a block writes it to that file; `<!-- not run: why -->` passes over it. A line
`antefix serve ... &` starts a server in the background, at a free port: what follows asks it (`curl`) where the page
says `SERVED`, until `kill %1` or the page's end.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import tiny_base
from markdown.extensions.toc import slugify
from served import serving
from test_layout import LAYERS
from typer.main import get_command
from typer.testing import CliRunner

import antefix
from antefix import embedded, errors
from antefix.cli import app
from antefix.errors import AntefixError
from antefix.methods import METHODS
from antefix.metrics.tokens_ptb import have_java

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"(?:<!-- (file|not run): ([^>]*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NEEDS_JAVA = re.compile(r"meteor|rouge_l\b|cider")
LINE = re.compile(r"^(?:antefix|curl|kill) ", re.MULTILINE)
"""The lines of a bash block that are run."""
SERVED = "http://127.0.0.1:8000"
"""Where a page's server listens, as the page has it."""


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """(marker, its value, language, content)"""
    return [match.groups(default="") for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]  # type: ignore[misc]


def is_run(marker: str, language: str, content: str) -> bool:
    return marker != "not run" and (language == "python" or (language == "bash" and LINE.search(content) is not None))


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
    address = SERVED
    with ExitStack() as background:
        for marker, value, language, content in blocks(page):
            content = content.replace(SERVED, address)
            if marker == "file":
                Path(value).write_text(content, encoding="utf-8")
            elif is_run(marker, language, content) and language == "python":
                exec(compile(content, str(page), "exec"), names)
            elif is_run(marker, language, content):
                for line in filter(LINE.match, content.replace("\\\n", " ").splitlines()):
                    if line.startswith("antefix serve "):
                        words = shlex.split(line.removesuffix("&"))[2:]
                        address = background.enter_context(serving(tmp_path, *words)).address
                    elif line.startswith("kill "):
                        background.close()
                    else:
                        run_line(line, page)


def run_line(line: str, page: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "curl":
        ask([*words, "-sS", "--fail-with-body"], page)
        return
    if NEEDS_JAVA.search(line) and not have_java():
        return
    result = CliRunner().invoke(app, words[1:])
    if isinstance(result.exception, AntefixError):
        pytest.fail(f"{page.name}: {line}: {result.exception}")
    assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"


def ask(command: list[str], page: Path) -> None:
    if shutil.which("curl") is not None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: {shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT / "docs")) in navigation, f"{page.name} is not in mkdocs.yml"
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link) if link else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings, as mkdocs makes anchors of them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {slugify(title, "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


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


def test_every_method_has_a_page_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file(), f"docs/methods/{name}.md is missing"
        assert f"[`{name}`](docs/methods/{name}.md)" in readme, f"README.md has no link to docs/methods/{name}.md"


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


# --- the pages that name code ---------------------------------------------------------------------------------

SOURCE = ROOT / "src" / "antefix"
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def as_said(node: ast.AST) -> str | None:
    """A text of the source as a page quotes it: `…` for what changes; None for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    said = "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return re.sub("…+", "…", said)


def texts_in(node: ast.AST) -> Iterator[str]:
    """Every whole text below a node, pieces of an f-string not counted."""
    said = as_said(node)
    if said is not None:
        yield said
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts_in(child)


def raised(name: str) -> set[str]:
    """The lines with which the source makes an error of this class."""
    calls = [n for tree in SOURCES.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    mine = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]
    return {text for call in mine for argument in call.args[:1] for text in texts_in(argument)}


def quoted(section: str) -> list[str]:
    """The error lines of a section: the code spans that its list items begin with."""
    items = [item for item in re.findall(r"^- (.*)", section, re.MULTILINE) if item.startswith("`")]
    return [CODE_SPAN.match(item)[2].strip() for item in items]  # type: ignore[index]


ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TROUBLE, flags=re.MULTILINE)[1:]}


def test_texts_of_the_source_are_told_as_a_page_quotes_them() -> None:
    tree = ast.parse("raise DataError(f'{a}, line {b}{c}: no ' f'{d!r} in ' 'it') if x else DataError('all' + 'two')")
    assert list(texts_in(tree)) == ["…, line …: no … in it", "all", "two"]
    assert quoted("- `a …` Text `b`.\n- Words `c`\n- ``d `e` `` f\n") == ["a …", "d `e`"]


def test_every_error_has_its_place_on_the_page_of_troubles() -> None:
    assert set(ERRORS) - {"AntefixError"} <= SECTIONS.keys()
    assert "`AntefixError`" in TROUBLE
    assert all(quoted(SECTIONS[name]) for name in ERRORS if name != "AntefixError")


@pytest.mark.parametrize("title", SECTIONS)
def test_the_lines_that_the_page_of_troubles_quotes_are_those_of_the_source(title: str) -> None:
    known = raised(title) if title in ERRORS else {text for tree in SOURCES.values() for text in texts_in(tree)}
    for line in quoted(SECTIONS[title]):
        assert line in known, f"no {title} says: {line}"


def test_the_layers_of_the_architecture_page_are_those_that_a_test_holds() -> None:
    drawn: list[set[str]] = []
    for line in ARCHITECTURE.partition("```text\n")[2].partition("```")[0].splitlines():
        if match := re.match(r"(- |  )([^\s,]+(?:, [^\s,]+)*)  ?", line):
            names = {name.removesuffix("/").removesuffix(".py") for name in match[2].split(", ")}
            drawn = [*drawn, names] if match[1] == "- " else [*drawn[:-1], drawn[-1] | names]
    assert drawn == LAYERS


def test_the_files_and_names_of_the_architecture_page_exist() -> None:
    spans = [match[2] for match in CODE_SPAN.finditer(ARCHITECTURE)]
    paths = [s for s in spans if re.fullmatch(r"[\w/.-]+(\.py|\.md|\.yml|/)", s) and "NAME" not in s]
    assert len(paths) > 40
    for path in paths:
        assert (ROOT / path).exists() or (SOURCE / path).exists(), path
    for path, name in re.findall(r"`([\w/]+\.py)`\s+`(\w+)`", ARCHITECTURE):
        code = (SOURCE / path).read_text(encoding="utf-8")
        assert re.search(rf"\b(def|class) {name}\b", code), f"{path} has no {name}"
