"""Frames: what is one, what it is made of, and their scores by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, tiny_base, tiny_method

import antefix
from antefix.attach import attached
from antefix.data import Example, read, sample_frames
from antefix.data.frames import Node, brackets, ending, parse
from antefix.errors import DataError
from antefix.frame_decoding import OnlyFrames
from antefix.metrics import score
from antefix.training.prepared import recipe_examples
from antefix.training.recipe import Recipe

FRAME = "[IN:GET_WEATHER will it rain [SL:LOCATION in [IN:GET_LOCATION boston ] ] now ]"


def test_a_frame_is_a_tree() -> None:
    assert parse(FRAME) == Node(
        "IN:GET_WEATHER",
        ("will", "it", "rain", Node("SL:LOCATION", ("in", Node("IN:GET_LOCATION", ("boston",)))), "now"),
    )
    root = parse(FRAME)
    assert root is not None
    assert root.words() == ("will", "it", "rain", "in", "boston", "now")
    assert sorted(brackets(root)) == [("IN:GET_LOCATION", 4, 5), ("IN:GET_WEATHER", 0, 6), ("SL:LOCATION", 3, 5)]


@pytest.mark.parametrize(
    "text",
    ["", "words alone", "[IN:A x", "[IN:A x ] ]", "[IN:A x ] y", "[SL:A x ]", "[IN:A [IN:B x ] ]",
     "[IN:A [SL:B [SL:C x ] ] ]", "[IN:a x ]", "[ IN:A x ]", "[IN:A x ] [IN:A x ]"],
)  # fmt: skip
def test_what_is_no_frame(text: str) -> None:
    assert parse(text) is None


def test_scores_by_hand() -> None:
    """One of two brackets right of the first, all of the second, none of the third, which is no frame."""
    references = [["[IN:A a [SL:B b ] ]"], ["[IN:A a ]"], ["[IN:A a ]"]]
    texts = ["[IN:A a [SL:C b ] ]", "[IN:A  a]", "[IN:A a"]
    found = score(references, texts, ["well_formed", "frame_f1", "accuracy"])
    assert found["well_formed"] == pytest.approx(2 / 3)
    assert found["frame_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["accuracy"] == 0.0
    assert score([["[IN:A a ]"]], ["[IN:A  a ]"], ["accuracy"])["accuracy"] == 1.0


def test_every_beginning_of_a_frame_begins_one() -> None:
    assert all(ending(FRAME[:n]) is not None for n in range(len(FRAME) + 1))
    labels = ["IN:GET_WEATHER", "SL:LOCATION", "IN:GET_LOCATION"]
    assert all(ending(FRAME[:n], labels) is not None for n in range(len(FRAME)))
    assert ending(FRAME[:5], ["IN:SET_ALARM"]) is None
    assert ending(FRAME, ["IN:GET_WEATHER", "SL:LOCATION"]) is None


@pytest.mark.parametrize("text", ["a", "]", "[S", "[IN:A [I", "[IN:A [SL:B [SL", "[IN:A x ] y", "[IN:A x ] [", "[x"])
def test_what_begins_no_frame(text: str) -> None:
    assert ending(text) is None


@pytest.mark.parametrize("symbols", [(), ("[IN:GO", "[SL:TO", "]")])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0, "seed": 1}])
def test_only_frames_are_written(symbols: tuple[str, ...], options: dict[str, Any]) -> None:
    """By random models, which would write none, whether symbols are tokens or not; labels are those of the tokens."""
    base = tiny_base("llama")
    sources = ["go to york", "a", "wake me up at nine"]
    decoding = antefix.Decoding(max_new_tokens=30, frames=True, **options)
    plain = antefix.Decoding(max_new_tokens=30, **options)
    module = tiny_method(base, "special_tokens", tokens=symbols) if symbols else tiny_method(base)
    with attached(base.model, module.requires_grad_(False)):
        assert not any(parse(text) for text in antefix.generate(base, sources, decoding=plain))
        trees = [parse(text) for text in antefix.generate(base, sources, decoding=decoding)]
    assert all(tree is not None for tree in trees)
    if symbols:
        assert {tree.label for tree in trees if tree} == {"IN:GO"}


@pytest.mark.parametrize("max_new_tokens", [20, 27, 40])
@pytest.mark.parametrize("liked", ["[", "]", "A", " "])
def test_long_labels_are_closed_in_time(max_new_tokens: int, liked: str) -> None:
    """One token a byte: a label that is spelled out takes most of what there is; many beginnings lead nowhere."""
    tokenizer = tiny_base("llama").tokenizer
    labels = ["IN:GET_WEATHER", "IN:GET_WEATHER_AND_SO_ON", "SL:DATE", "SL:DATE_TIME_RECURRING"]
    for seed in range(4):
        processor = OnlyFrames([tokenizer], 0, tokenizer.eos_token_id, max_new_tokens, 1, labels)
        draw = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        while len(ids) < max_new_tokens and tokenizer.eos_token_id not in ids:
            scores = torch.randn(1, len(tokenizer), generator=draw)
            scores[0, tokenizer.convert_tokens_to_ids(tokenizer.tokenize(liked))] += 2
            ids.append(int(processor(torch.tensor([ids], dtype=torch.long), scores).argmax()))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert parse(text) is not None, text


def test_the_shortest_ending() -> None:
    labels = ["IN:GET_WEATHER", "SL:DATE", "SL:DAY", "IN:GO"]
    for text, wanted in {
        "": "[IN:GO ]", "[IN:GE": "T_WEATHER ]", "[IN:GO in [": "SL:DAY ] ]", "[IN:GO [SL:DAT": "E ] ]",
        "[IN:GO x": " ]", "[IN:GO ]": "", "[SL": None, "[IN:GO [SL:X": None,
    }.items():  # fmt: skip
        assert ending(text, labels) == wanted
    assert ending("[IN:") == "A ]"
    assert ending("[IN:GO [SL:X") == " ] ]"


@pytest.mark.skipif(not (SHARED / "data" / "top_english_small").is_dir(), reason="the data is not here")
def test_real_frames_are_all_well_formed() -> None:
    path = SHARED / "data" / "top_english_small" / "validation.tsv"
    examples = read(str(path), source_column="utterance", target_column="semantic_parse")
    assert len(examples) > 1000
    assert all(parse(target) is not None for example in examples for target in example.targets)


class TestSamplesOfEveryLabel:
    EXAMPLES = tuple(
        Example(source=str(n), targets=(f"[IN:{'ABC'[n % 3]} a [SL:{'XY'[n % 2]} {n} ] ]" if n else "[IN:RARE 0 ]",))
        for n in range(40)
    )

    @pytest.mark.parametrize("samples", [1, 2, 5, 40])
    def test_an_example_is_kept_while_a_label_has_fewer(self, samples: int) -> None:
        """Against the sampler as it is defined, which counts what it has kept."""
        kept: list[Example] = []
        order = list(self.EXAMPLES)
        random.Random("frames-3").shuffle(order)
        for example in order:
            if any(sum(label in labels(one) for one in kept) < samples for label in labels(example)):
                kept.append(example)
        assert {e.source for e in sample_frames(self.EXAMPLES, samples, seed=3)} == {e.source for e in kept}

    def test_a_larger_draw_begins_with_the_smaller_one(self) -> None:
        small, large = (sample_frames(self.EXAMPLES, n, seed=3) for n in (1, 4))
        assert len(small) < len(large) < len(self.EXAMPLES)
        assert large[: len(small)] == small

    def test_a_recipe_draws_them(self, tmp_path: Path) -> None:
        rows = [{"source": str(e.source), "target": t} for e in self.EXAMPLES for t in e.targets]
        (tmp_path / "top.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        data = {"train": str(tmp_path / "top.jsonl"), "dev": str(tmp_path / "top.jsonl"), "samples_per_label": 2}
        recipe = Recipe.model_validate({"name": "few", "data": data, "training": {"seed": 3}})
        train, dev = recipe_examples(recipe)
        assert [e.source for e in train] == [e.source for e in sample_frames(self.EXAMPLES, 2, seed=3)]
        assert len(dev) == len(self.EXAMPLES)

    def test_the_seed_decides(self) -> None:
        assert sample_frames(self.EXAMPLES, 2, seed=3) == sample_frames(self.EXAMPLES, 2, seed=3)
        assert sample_frames(self.EXAMPLES, 2, seed=3) != sample_frames(self.EXAMPLES, 2, seed=4)

    def test_a_target_that_is_no_frame(self) -> None:
        with pytest.raises(DataError, match=r"an example: 'words' is no frame, such as \[IN:GET_WEATHER is it cold \]"):
            sample_frames([Example(source="a", targets=("words",))], 1, seed=0)


def labels(example: Example) -> set[str]:
    root = parse(example.targets[0])
    assert root is not None
    return {label for label, _, _ in brackets(root)}
