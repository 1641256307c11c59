"""`antefix init` looks at a data file and writes a recipe that loads, reads the same data, and can be trained."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, tiny_base, tiny_model
from typer.testing import CliRunner

from antefix import embedded
from antefix.cli import app
from antefix.data import read
from antefix.data.look import look
from antefix.errors import AntefixError, DataError
from antefix.training.first_recipe import prefix_name, task_description
from antefix.training.recipe import Recipe, load_recipe

MENUS = "name,price,id,text\nFern,4 €,1,Fern costs 4 €.\nMill,,2,Mill Inn.\nFern,4 €,3,For 4 €: Fern.\n"
E2E = 'mr,ref\n"name[Mill Inn], eatType[pub]",Mill Inn is a pub.\nname[Fern],Fern.\n'
TRIPLES = (
    '{"triples": ["a | r | b"], "lexs": [{"text": "A is b."}]}\n{"triples": ["c | s | d"], "lexs": [{"text": "D."}]}\n'
)
ALPACA = '{"instruction": "Greet.", "output": "Hi."}\n{"instruction": "Part.", "output": "Bye."}\n'
CONTEXT = tiny_model("llama").config.max_position_embeddings
FILES = {"menus.csv": MENUS, "e2e.csv": E2E, "facts.jsonl": TRIPLES, "talk.jsonl": ALPACA}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANTEFIX_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    return tmp_path / "work"


def init(*words: str) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, ["init", *words])
    if isinstance(result.exception, AntefixError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def data_of(recipe: Recipe) -> list[Any]:
    return read(recipe.data.train, format=recipe.data.format, **recipe.data.reader)


@pytest.fixture
def kept_base() -> str:
    """A tiny base in the embedded one's place."""
    folder = embedded.home() / "bases" / embedded.NAME
    base = tiny_base("llama")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


class TestRecipes:
    @pytest.mark.parametrize(
        ("file", "format", "text"),
        [
            ("menus.csv", "plain", {"linearise": "table"}),
            ("e2e.csv", "e2e", {"linearise": "e2e"}),
            ("facts.jsonl", "triples", {"linearise": "triples"}),
            ("talk.jsonl", "chat", {"chat": True}),
        ],
    )
    def test_of_every_reader_loads_and_reads_the_same(self, file: str, format: str, text: dict[str, Any]) -> None:
        init(file)
        recipe = load_recipe(Path(file).with_suffix(".toml"))
        assert (recipe.name, recipe.data.train, recipe.data.format) == (Path(file).stem, file, format)
        assert recipe.data.text == text
        assert data_of(recipe) == read(file)
        assert recipe.method_config.num_virtual_tokens == 10  # type: ignore[attr-defined]

    def test_of_the_hub_loads_too(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        datasets.disable_progress_bars()
        (folder / "menus").mkdir()
        for split in ("train", "validation", "test"):
            (folder / f"menus/{split}.csv").write_text(MENUS, encoding="utf-8")
        init("hf:menus", "--target-column", "name", "--source-column", "text")
        recipe = load_recipe(Path("menus.toml"))
        assert (recipe.data.train, recipe.data.dev) == ("hf:menus::train", "hf:menus::validation")
        assert [e.targets for e in data_of(recipe)] == [("Fern",), ("Mill",), ("Fern",)]

    def test_can_be_trained(self, kept_base: str) -> None:
        init("menus.csv")
        result = CliRunner().invoke(app, ["train", "menus.toml", "training.max_steps=2"])
        assert result.exit_code == 0, result.exception
        assert Path("bank/menus/card.json").is_file()

    def test_columns_that_were_named_are_kept(self) -> None:
        init("menus.csv", "--target-column", "name", "--table-columns", "price, text")
        recipe = load_recipe(Path("menus.toml"))
        assert recipe.data.reader == {"target_column": "name", "table_columns": ["price", "text"]}
        assert data_of(recipe)[0].targets == ("Fern",)
        assert [field for field, _ in data_of(recipe)[0].source.fields] == ["price", "text"]

    def test_odd_texts_do_no_harm(self) -> None:
        """What stands in comments and strings of the recipe comes out of the data."""
        rows = [{"source": 'a\n"b"\\ \x07 # ]]', "target": 't"\\\x7f'}, {"source": "c", "target": "d"}] * 9
        Path('od"d.jsonl').write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        init('od"d.jsonl')
        assert len(data_of(load_recipe(Path("od-d.toml")))) == 2

    def test_is_for_people(self) -> None:
        init("menus.csv")
        text = Path("menus.toml").read_text(encoding="utf-8")
        assert "# 2 sources with 3 targets." in text
        assert "# The base reads: name: Fern | price: 4 €" in text
        assert 'initial_text = "Describe the following facts in a natural sentence:"  # training starts from' in text
        assert max(map(len, text.splitlines())) < 130


class TestSettings:
    def recipe(self, num_pairs: int) -> Recipe:
        rows = "".join(f"Nr {n},Number {n} is here.\n" for n in range(num_pairs))
        Path("rows.csv").write_text("name,text\n" + rows, encoding="utf-8")
        init("rows.csv", "--force")
        return load_recipe(Path("rows.toml"))

    @pytest.mark.parametrize(
        ("num_pairs", "pairs", "epochs", "pairs_per_step", "patience"),
        [(20, None, 40, 8, 3), (500, None, 8, 16, 3), (4000, None, 1, 16, None), (5001, 2000, 2, 16, None)],
    )
    def test_fit_the_number_of_pairs(
        self, num_pairs: int, pairs: int | None, epochs: int, pairs_per_step: int, patience: int | None
    ) -> None:
        recipe = self.recipe(num_pairs)
        assert recipe.data.pairs == pairs
        assert recipe.training.epochs == epochs
        assert (recipe.training.pairs_per_step, recipe.training.patience) == (pairs_per_step, patience)

    def test_decoding_fits_the_targets(self) -> None:
        decoding = self.recipe(20).decoding
        assert decoding is not None
        assert (decoding.num_beams, decoding.max_new_tokens) == (5, 10)
        init("talk.jsonl")
        decoding = load_recipe(Path("talk.toml")).decoding
        assert decoding is not None
        assert decoding.num_beams == 1

    def test_sources_are_cut_where_the_base_has_no_room(self, kept_base: str) -> None:
        row = {"source": "w" * CONTEXT, "target": "w" * 25}
        Path("long.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "source": "word"}), encoding="utf-8")
        facts = json.loads(init("long.jsonl", "--json"))
        assert facts["tokens"]["context"] == CONTEXT
        recipe = load_recipe(Path("long.toml"))
        assert recipe.data.max_source_tokens == CONTEXT - 30 - 2, "30 new tokens, a separator and an end"
        init("menus.csv")
        assert load_recipe(Path("menus.toml")).data.max_source_tokens is None


class TestWhereTheDevSetIs:
    def test_nowhere(self) -> None:
        init("menus.csv")
        recipe = load_recipe(Path("menus.toml"))
        assert (recipe.data.dev, recipe.data.dev_fraction) == (None, 0.1)

    def test_in_the_zip(self) -> None:
        with zipfile.ZipFile("set.zip", "w") as archive:
            for name in ("trainset", "devset", "testset"):
                archive.writestr(f"set/{name}.csv", E2E)
        for file in ("set.zip", "set.zip::trainset.csv"):
            init(file, "--force")
            data = load_recipe(Path("set.toml")).data
            assert (data.train, data.dev) == ("set.zip::trainset.csv", "set.zip::devset.csv")
        init("set.zip::devset.csv", "--force")
        assert load_recipe(Path("set.toml")).data.dev is None, "what is trained on is no dev set"

    @pytest.mark.parametrize("word", ["dev", "validation"])
    def test_in_the_file(self, word: str) -> None:
        rows = [{"split": s, "source": f"{s} {n}", "target": "x"} for s in ("train", word, "test") for n in range(3)]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        init("rows.jsonl")
        recipe = load_recipe(Path("rows.toml"))
        assert (recipe.data.train, recipe.data.dev) == ("rows.jsonl::train", f"rows.jsonl::{word}")
        assert [e.source for e in data_of(recipe)] == ["train 0", "train 1", "train 2"]

    @pytest.mark.parametrize("word", ["train", "dev"])
    def test_a_file_of_one_split_is_a_whole(self, word: str) -> None:
        row = {"split": word, "source": "a", "target": "b"}
        Path("rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
        init("rows.jsonl")
        data = load_recipe(Path("rows.toml")).data
        assert (data.train, data.dev) == ("rows.jsonl", None)

    @pytest.mark.parametrize("word", ["dev", "valid", "validation", "val"])
    def test_beside_the_file(self, word: str) -> None:
        Path("menus_train.csv").write_text(MENUS, encoding="utf-8")
        Path(f"menus_{word}.csv").write_text(MENUS, encoding="utf-8")
        init("menus_train.csv")
        assert load_recipe(Path("menus_train.toml")).data.dev == f"menus_{word}.csv"

    @pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data sets are not here")
    def test_of_the_real_e2e_set(self) -> None:
        facts = json.loads(init(str(SHARED / "data/e2e_nlg/e2e-dataset.zip"), "--json"))
        assert (facts["format"], facts["sources"], facts["pairs"]) == ("e2e", 4862, 42061)
        assert facts["dev"].endswith("e2e-dataset.zip::devset.csv")
        assert facts["target_chars"] == {"median": 106, "longest": 343}
        assert load_recipe(Path("e2e-dataset.toml")).data.pairs == 2000


class TestPrinting:
    def test_for_people(self) -> None:
        printed = init("menus.csv", "--out", "my recipe.toml").splitlines()
        assert printed == [
            "menus.csv: format 'plain', 2 sources with 3 targets",
            "source: name, price; 16 characters, at most 23",
            "target: text; 14 characters, at most 15",
            "dev: a tenth of the sources, drawn with the seed",
            "text: linearised as 'table'",
            "wrote my recipe.toml; look it over, then run: antefix train 'my recipe.toml'",
        ]

    def test_for_machines(self, kept_base: str) -> None:
        facts = json.loads(init("menus.csv", "--json"))
        assert facts == {
            "train": "menus.csv",
            "dev": None,
            "format": "plain",
            "sources": 2,
            "pairs": 3,
            "source_columns": ["name", "price"],
            "target_column": "text",
            "fields": ["name", "price"],
            "classes": [],
            "text": {"linearise": "table"},
            "source_chars": {"median": 16, "longest": 23},
            "target_chars": {"median": 14, "longest": 15},
            # One token a byte, and the euro sign is three.
            "tokens": {
                "source": {"median": 17, "longest": 25},
                "target": {"median": 16, "longest": 17},
                "context": CONTEXT,
            },
            "recipe": "menus.toml",
            "next": "antefix train menus.toml",
        }

    def test_tokens_of_a_base_in_a_folder(self, kept_base: str) -> None:
        assert json.loads(init("menus.csv", "--base", kept_base, "--json"))["tokens"]["context"] == CONTEXT
        assert load_recipe(Path("menus.toml")).base == kept_base

    @pytest.mark.parametrize("base", ["smollm2-135m", "nobody/nothing", "no name at all", "a/b/c", "x.gguf"])
    def test_a_base_that_is_not_here_is_not_fetched(self, base: str) -> None:
        assert json.loads(init("menus.csv", "--base", base, "--json"))["tokens"] is None
        assert tomllib.loads(Path("menus.toml").read_text(encoding="utf-8"))["base"] == base

    def test_classes_are_seen(self) -> None:
        rows = "".join(f"film {n},{'good' if n % 2 else 'bad'}\n" for n in range(10))
        Path("films.csv").write_text("text,label\n" + rows, encoding="utf-8")
        assert "the targets are 2 classes: bad, good" in init("films.csv")
        recipe = load_recipe(Path("films.toml"))
        assert recipe.config["initial_text"] == "Classify as bad or good:"


class TestRefusals:
    def test_a_recipe_is_not_replaced_unasked(self) -> None:
        Path("menus.toml").write_text("mine", encoding="utf-8")
        with pytest.raises(AntefixError, match=r"menus.toml is there already: give another --out, or --force"):
            init("menus.csv")
        assert Path("menus.toml").read_text(encoding="utf-8") == "mine"
        init("menus.csv", "--force")
        assert load_recipe(Path("menus.toml")).name == "menus"

    def test_a_place_that_cannot_be_written(self) -> None:
        with pytest.raises(AntefixError, match=r"menus.csv/a.toml: cannot be written \("):
            init("menus.csv", "--out", "menus.csv/a.toml")

    def test_a_bad_file_is_named_and_nothing_is_written(self) -> None:
        Path("bad.csv").write_text("source,target\na,b\nc,\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"bad.csv, line 3: 'target' is empty"):
            init("bad.csv")
        assert not Path("bad.toml").exists()

    def test_no_target(self) -> None:
        Path("a.csv").write_text("name,preis\nFern,4\n", encoding="utf-8")
        with pytest.raises(
            DataError, match=r"a.csv: no target among the columns name, preis: name it .*--target-column NAME"
        ):
            init("a.csv")
        Path("a.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
        with pytest.raises(DataError, match=r"a.jsonl: no target .* messages: rows of the format 'chat' need one"):
            init("a.jsonl")
        Path("a.csv").write_text("name,preis\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"a.csv: the file has no rows"):
            init("a.csv")

    def test_options_of_another_reader(self) -> None:
        with pytest.raises(DataError, match="the reader 'e2e' has no option 'target_column'"):
            init("e2e.csv", "--target-column", "ref")

    def test_the_command_line_prints_one_line(self) -> None:
        command = [sys.executable, "-c", "from antefix.cli import main; main()", "init", "none.csv"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "antefix: none.csv: no such file\n")


def test_neither_torch_nor_transformers_is_needed(kept_base: str) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['antefix', 'init', 'menus.csv', '--json']\n"
        "from antefix.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] is not None


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("data/menus.csv", "menus"),
        ("menus.v2.jsonl.gz", "menus.v2"),
        ("set.zip::trainset.csv", "set"),
        ("webnlg/train.jsonl.gz", "webnlg"),
        ("hf:owner/Nice_Set:small::train", "Nice_Set"),
        ("café menüs.csv", "cafe-menus"),
        ("-x.csv", "x"),
        ("日本.csv", "prefix"),
        ("a" * 200 + ".csv", "a" * 100),
    ],
)
def test_names(train: str, name: str) -> None:
    assert prefix_name(train) == name
    assert Recipe(name=name, data={"train": train}).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("say hi", "hello there")] * 2, "Write the answer to the following text:"),
        ([("a very long text " * 40, "a short one")] * 2, "Summarise the following text in a few words:"),
        ([("good film", "yes"), ("bad film", "no")] * 4, "Classify as yes or no:"),
    ],
)
def test_task_descriptions(rows: list[tuple[str, str]], words: str) -> None:
    content = [json.dumps({"source": f"{s} {n}", "target": t}) for n, (s, t) in enumerate(rows)]
    Path("rows.jsonl").write_text("\n".join(content), encoding="utf-8")
    found = look("rows.jsonl")
    assert task_description(found) == words


def test_task_descriptions_of_facts_and_conversations() -> None:
    assert task_description(look("facts.jsonl")) == "Describe the following facts in a natural sentence:"
    assert task_description(look("talk.jsonl")) == "Answer the request of the user helpfully:"
