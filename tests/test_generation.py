"""Generation: the card decides unless told otherwise, order and rows are kept, an interruption loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_base
from test_prefix_file import no_file_larger_than
from typer.testing import CliRunner

from antefix.attach import attached
from antefix.base import Base
from antefix.cli import app
from antefix.data import Example, Table
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.errors import AntefixError, BaseModelError, CommandError, DataError, GenerationError
from antefix.generated_file import GeneratedFile
from antefix.generation import default_decoding, generate, generate_each
from antefix.prefix import Prefix
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import train

SHORT = Decoding(max_new_tokens=6)
SOURCES = ["a", "a much longer source than the first", "abc", "of middle length"]


def tables(count: int = 5) -> list[Example]:
    return [
        Example(source=Table((("name", "x" * (n + 1)),)), targets=(f"It is {n}.",), where=f"t.csv, line {n + 2}")
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def prefix(base: Base) -> Prefix:
    return train(
        base, tables(), decoding=Decoding(max_new_tokens=5, num_beams=3), training=TrainingRecipe(max_steps=2),
        num_virtual_tokens=4,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("decoding", [SHORT, Decoding(max_new_tokens=6, num_beams=3)])
def test_a_batch_writes_what_each_source_writes_alone(name: str, decoding: Decoding) -> None:
    base = tiny_base(name)
    together = generate(base, SOURCES, decoding=decoding, batch_size=3)
    assert together == [generate(base, [s], decoding=decoding)[0] for s in SOURCES]


def test_every_source_its_own_prefix(base: Base, prefix: Prefix) -> None:
    with attached(base.model, prefix):
        with_prefix = generate(base, tables(), text_format=TextFormat(linearise="table"), decoding=SHORT)
    bare = generate(base, tables(), text_format=TextFormat(linearise="table"), decoding=SHORT)
    assert with_prefix != bare
    with attached(base.model, prefix, rows=[0, -1, 0, -1, -1]) as attachment:
        mixed = generate(base, tables(), text_format=TextFormat(linearise="table"), decoding=SHORT, batch_size=2)
        assert attachment.rows is not None
        assert attachment.rows.tolist() == [0, -1, 0, -1, -1]
        with pytest.raises(GenerationError, match=r"2 sources, but attachment.rows has 5 entries"):
            generate(base, tables(2), decoding=SHORT)
    assert mixed == [with_prefix[0], bare[1], with_prefix[2], bare[3], bare[4]]


def test_the_card_decides_unless_told_otherwise(base: Base, prefix: Prefix) -> None:
    with attached(base.model, prefix):
        by_card = generate(base, tables())
        assert by_card == generate(
            base, tables(), text_format=TextFormat(linearise="table"), decoding=Decoding(max_new_tokens=5, num_beams=3)
        )
        assert by_card != generate(base, tables(), decoding=Decoding(max_new_tokens=1))


def test_default_decoding_takes_beams_for_tables() -> None:
    assert default_decoding(tables()).num_beams == 5
    assert default_decoding(["plain text"]).num_beams == 1


def test_a_seed_makes_sampling_repeatable(base: Base) -> None:
    def sampled(seed: int) -> list[str]:
        return generate(base, SOURCES, decoding=Decoding(max_new_tokens=8, do_sample=True, temperature=2.0, seed=seed))

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("extra", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_faster_ways_to_decode_write_the_same(base: Base, prefix: Prefix, extra: dict[str, object]) -> None:
    with attached(base.model, prefix):
        plain = generate(base, SOURCES, text_format=TextFormat(), decoding=SHORT)
        assert plain == generate(
            base, SOURCES, text_format=TextFormat(), decoding=SHORT.model_copy(update=extra), batch_size=2
        )


def test_an_assistant_model_changes_nothing(base: Base, prefix: Prefix) -> None:
    assistant = tiny_base("llama").model
    with attached(base.model, prefix):
        plain = generate(base, SOURCES, text_format=TextFormat(), decoding=SHORT)
        guessed = dict(
            generate_each(base, SOURCES, text_format=TextFormat(), decoding=SHORT, assistant_model=assistant)
        )
    assert plain == [guessed[n] for n in range(len(SOURCES))]


def test_what_does_not_fit_is_named(base: Base, prefix: Prefix) -> None:
    with pytest.raises(GenerationError, match="nothing to generate"):
        generate(base, [])
    with pytest.raises(GenerationError, match=r"a source: \d+ source tokens and max_new_tokens 100 do not fit"):
        generate(base, ["word " * 100])
    with attached(base.model, prefix), pytest.raises(DataError, match="writes tables, the data holds plain text"):
        generate(base, ["plain"])


def test_an_interrupted_file_goes_on_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    file = GeneratedFile(path, ["task"])
    file.add(2, "third")
    file.add(0, "first")
    with file.partial.open("a") as broken:
        broken.write('[1, "sec')  # the process died here
    again = GeneratedFile(path, ["task"])
    assert again.texts == {2: "third", 0: "first"}
    with pytest.raises(GenerationError, match=r"texts.jsonl.partial belongs to other sources"):
        GeneratedFile(path, ["other task"])
    again.add(1, "second\nline")
    again.finish(["a", "b", "c"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"index": 1, "where": "b", "text": "second\nline"}
    assert not again.partial.exists()
    with pytest.raises(GenerationError, match=r"exists: choose another name, or say --overwrite"):
        GeneratedFile(path, ["task"])


def test_a_text_file_has_one_text_a_line(tmp_path: Path) -> None:
    file = GeneratedFile(tmp_path / "texts.txt", ["task"])
    file.add(0, "two\nlines")
    file.add(1, "")
    file.finish(["", ""])
    assert (tmp_path / "texts.txt").read_text() == "two lines\n\n"


@pytest.fixture(scope="module")
def shop(base: Base, prefix: Prefix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    prefix.save(folder / "bank" / "menus")
    (folder / "menus.csv").write_text("name,text\nx,It is 0.\nxx,It is 1.\nxxx,It is 2.\n")
    return folder


def invoked(shop: Path, *words: str, stdin: str | None = None) -> str:
    result = CliRunner().invoke(
        app, ["generate", "-p", str(shop / "bank/menus"), "--base", str(shop / "base"), *words], input=stdin
    )
    if isinstance(result.exception, AntefixError):
        return f"{type(result.exception).__name__}: {result.exception}"
    assert result.exception is None, result.output
    return result.stdout.strip()


def test_the_command_writes_one_text_a_file_and_standard_input(shop: Path, base: Base, prefix: Prefix) -> None:
    with attached(base.model, prefix):
        expected = generate(base, tables(3))
    assert invoked(shop, "name: x") == expected[0]
    assert invoked(shop, "name[xx]") == expected[1]
    assert invoked(shop, stdin="name: xxx\n") == expected[2]
    assert json.loads(invoked(shop, "name: x", "--json")) == {"text": expected[0]}
    output = shop / "texts.txt"
    assert invoked(shop, "-i", str(shop / "menus.csv"), "-o", str(output)) == f"3 texts in {output}"
    assert output.read_text().splitlines() == [" ".join(t.split()) for t in expected]


def test_sources_that_are_cut_are_counted(shop: Path) -> None:
    result = CliRunner().invoke(
        app, ["generate", "-p", str(shop / "bank/menus"), "--base", str(shop / "base"), "-i", str(shop / "menus.csv"),
              "-o", str(shop / "cut.txt"), "--text", "max_source_tokens=8"],
    )  # fmt: skip
    assert "cut to the text format's max_source_tokens: 2 sources" in result.stderr


def test_line_ends_of_other_kinds_do_not_end_a_line(tmp_path: Path) -> None:
    file = GeneratedFile(tmp_path / "texts.jsonl", ["task"])
    texts = ["one\u2028two", "three\x85four", "five\rsix", "seven"]
    for index, text in enumerate(texts):
        file.add(index, text)
    again = GeneratedFile(tmp_path / "texts.jsonl", ["task"])
    assert list(again.texts.values()) == texts


def test_a_full_disk_is_one_line_when_going_on(tmp_path: Path) -> None:
    file = GeneratedFile(tmp_path / "texts.jsonl", ["task"])
    for index in range(100):
        file.add(index, "a text")
    again = GeneratedFile(tmp_path / "texts.jsonl", ["task"])
    with no_file_larger_than(100), pytest.raises(GenerationError, match=r"texts.jsonl.partial: cannot be written \("):
        again.add(100, "a text")
    assert len(GeneratedFile(tmp_path / "texts.jsonl", ["task"]).texts) == 100


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoders_own_room_is_checked(name: str) -> None:
    base = tiny_base(name)
    generate(base, ["a"], decoding=Decoding(max_new_tokens=3))
    if base.context_length is not None:
        with pytest.raises(GenerationError, match="max_new_tokens 512 do not fit into the context of 512 tokens"):
            generate(base, ["a"], decoding=Decoding(max_new_tokens=512))


def test_an_encoder_writes_no_text() -> None:
    with pytest.raises(BaseModelError, match=r"the base 'tiny-bert' \(BertForMaskedLM\) writes no text"):
        generate(tiny_base("bert"), ["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cache_implementation": "foo"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "works without beams only"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is more than max_new_tokens 8"),
    ],
)
def test_decoding_that_makes_no_sense_is_refused(content: dict[str, object], message: str, shop: Path) -> None:
    words = [word for key, value in content.items() for word in ("--set", f"{key}={value}")]
    said = invoked(shop, "name: x", "--set", "num_beams=1", *words)
    assert said.startswith("RecipeError: ")
    assert message in said
    assert "\n" not in said


def test_the_commands_mistakes_are_one_line(shop: Path) -> None:
    menus = str(shop / "menus.csv")
    assert "say where the texts go" in invoked(shop, "-i", menus)
    assert "--output takes a file" in invoked(shop, "-i", menus, "-o", "-")
    assert "not both" in invoked(shop, "name: x", "-i", menus, "-o", "x.txt")
    assert "--output is for what a file's sources get: give the file with --input" in invoked(
        shop, "name: x", "-o", "x.txt"
    )
    assert "unknown key 'decoding option num_beam': did you mean 'num_beams'?" in invoked(
        shop, "name: x", "--set", "num_beam=3"
    )
    assert "is no table" in invoked(shop, "just words")
    assert "no such file" in invoked(shop, "-i", "none.csv", "-o", "x.txt")
    bare = CliRunner().invoke(app, ["generate", "name: x"])
    assert isinstance(bare.exception, CommandError)
    assert "say which prefix" in str(bare.exception)


def test_columns_of_other_names_are_told_to_generate_and_eval(shop: Path) -> None:
    file, texts = shop / "deutsch.csv", str(shop / "deutsch.jsonl")
    file.write_text("name,dish,beschreibung\nFern Hill,soup,Soup is served.\n", encoding="utf-8")
    named = ("--reader", "target_column=beschreibung")
    words = ("generate", "-p", str(shop / "bank/menus"), "--base", str(shop / "base"), "-i", str(file), "-o", texts)
    assert CliRunner().invoke(app, [*words, *named]).exit_code == 0
    scored = ["eval", "--references", str(file), "--hypotheses", texts, "--metrics", "bleu", "--json"]
    assert "name it, --reader target_column=NAME" in str(CliRunner().invoke(app, scored).exception)
    assert json.loads(CliRunner().invoke(app, [*scored, *named]).stdout)["inputs"] == 1
    wrong = CliRunner().invoke(app, [*words[:-1], str(shop / "x.jsonl"), "--reader", "target=beschreibung"])
    assert "has no option 'target': did you mean" in str(wrong.exception)


def test_a_field_that_was_not_in_training_is_told(shop: Path, base: Base) -> None:
    examples = [Example(source=Table((("name", "x" * n),)), targets=(f"It is {n}.",)) for n in range(1, 5)]
    training = TrainingRecipe(max_steps=1, pairs_per_step=2, evaluations=0)
    kept = train(base, examples, training=training, num_virtual_tokens=2)
    assert kept.card.training["fields"] == ["name"]
    kept.save(shop / "bank" / "trained")
    file = shop / "answers.csv"
    file.write_text("name,answer\nx,It is 0.\n", encoding="utf-8")
    words = ["generate", "-p", str(shop / "bank/trained"), "--base", str(shop / "base"), "-i", str(file), "-o"]
    said = CliRunner().invoke(app, [*words, str(shop / "leaked.txt")])
    assert said.exit_code == 0
    assert "has not seen the field 'answer' in training (name); if it holds" in " ".join(said.stderr.split())
    said = CliRunner().invoke(app, [*words, str(shop / "well.txt"), "--reader", "target_column=answer"])
    assert said.exit_code == 0
    assert "has not seen" not in said.stderr
    file.write_text("prefix,name,answer\ntrained,x,It is 0.\n,y,It is 1.\n", encoding="utf-8")
    words = ["generate", "--prefix-column", "prefix", "--bank", str(shop / "bank"), *words[3:]]
    said = CliRunner().invoke(app, [*words, str(shop / "each.txt")])
    assert said.exit_code == 0
    assert said.stderr.count("has not seen the field") == 1


def test_generating_leaves_the_base_as_it_was(base: Base, prefix: Prefix) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base.model(ids).logits
        with attached(base.model, prefix):
            generate(base, tables(2))
        assert torch.equal(before, base.model(ids).logits)
