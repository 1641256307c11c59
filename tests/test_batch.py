"""From examples to tokens, from tokens to optimiser steps and batches, from losses to one number."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import ClassVar, get_args

import pytest
import torch
from conftest import ENCODER_DECODER, VOCABULARY, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import at_best

from antefix.batches.batch import encoder_decoder_batch, packed_batch, padded_batch
from antefix.batches.head import pair_losses
from antefix.batches.labelled import labelled_batch
from antefix.data import Chat, Example, Message, Table
from antefix.data.encode import Encoded, EncodedExample, Limits, encode
from antefix.data.linearise import TextFormat
from antefix.data.plan import Unit, all_units, microbatches, steps
from antefix.errors import DataError
from antefix.training.objectives import LossReduction, StepSize, reduce_losses

NO_LIMITS = Limits(context=None)


def encoded(*shapes: tuple[int, tuple[int, ...]], for_encoder: bool = False) -> Encoded:
    """So many source tokens, targets of these lengths, all tokens different."""
    count = itertools.count(3)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(next(count) % VOCABULARY for _ in range(number))

    examples = tuple(EncodedExample(ids(s), tuple(ids(t) for t in targets)) for s, targets in shapes)
    return Encoded(examples, 0, 0, for_encoder)


def tagged(example: EncodedExample) -> EncodedExample:
    """With a label at every place, as often as it has targets."""
    places = tuple(range(len(example.source)))
    return replace(example, targets=(places,) * len(example.targets), places=places)


REFERENCES = encoded((4, (3,) * 9), (5, (2,)), (6, ()), (3, (4,) * 4), (2, (1, 2, 3)))
"""17 pairs of 5 sources, one without any."""


class TestEncoding:
    def test_sources_and_targets_apart(self) -> None:
        example = Example(source="ab", targets=("c", "de"))
        made = encode([example], TextFormat(separator="="), tiny_tokenizer(), NO_LIMITS)
        tokens = tiny_tokenizer()
        assert [tokens.decode(made.examples[0].source)] == ["ab="]
        assert [tokens.decode(t) for t in made.examples[0].targets] == ["c</s>", "de</s>"]
        assert (made.num_pairs, made.truncated_sources, made.truncated_targets) == (2, 0, 0)

    def test_what_is_cut_is_counted(self) -> None:
        examples = [Example(source="abcdefgh", targets=("xy", "xyz")), Example(source="abc", targets=("x",))]
        limits = Limits(context=None, target=3)
        made = encode(examples, TextFormat(max_source_tokens=6), tiny_tokenizer(), limits)
        decode = tiny_tokenizer().decode
        assert [decode(e.source) for e in made.examples] == ["abcde\n", "abc\n"]
        assert [decode(t) for t in made.examples[0].targets] == ["xy</s>", "xyz"], "a cut target does not end"
        assert (made.truncated_sources, made.truncated_targets) == (1, 1)

    def test_a_source_that_just_fits_is_not_cut(self) -> None:
        made = encode([Example(source="abcde")], TextFormat(max_source_tokens=6), tiny_tokenizer(), NO_LIMITS)
        assert made.truncated_sources == 0

    def test_what_does_not_fit_is_named(self) -> None:
        example = Example(source="abcde", targets=("x", "xyz"), where="menus.csv, line 3")
        encode([example], TextFormat(), tiny_tokenizer(), Limits(context=10))
        with pytest.raises(
            DataError,
            match=r"^menus.csv, line 3: 6 source and 4 target tokens do not fit into .* context of 9; shorten",
        ):
            encode([example], TextFormat(), tiny_tokenizer(), Limits(context=9))

    def test_an_encoder_and_its_decoder_have_a_context_each(self) -> None:
        example = Example(source="abcde", targets=("xyz",))
        assert encode([example], TextFormat(), tiny_tokenizer(), Limits(context=5), for_encoder=True).for_encoder
        with pytest.raises(DataError, match="5 source and 4 target tokens do not fit"):
            encode([example], TextFormat(), tiny_tokenizer(), Limits(context=4), for_encoder=True)

    @pytest.mark.parametrize(
        ("source", "text_format", "message"),
        [
            (Table((("a", "b"),)), TextFormat(), "menus.csv, line 3: the linearisation 'plain' writes plain text, the"),
            ("hi", TextFormat(linearise="e2e"), "menus.csv, line 3: the linearisation 'e2e' writes tables, the data"),
            (Chat((Message("user", "hi"),)), TextFormat(max_source_tokens=2), "menus.csv, line 3: max_source_tokens"),
        ],
    )
    def test_a_source_that_cannot_be_written_is_named(
        self, source: Table | Chat | str, text_format: TextFormat, message: str
    ) -> None:
        with pytest.raises(DataError, match=f"^{message}"):
            encode([Example(source=source, where="menus.csv, line 3")], text_format, tiny_tokenizer(), NO_LIMITS)

    def test_a_target_needs_a_token_before_it(self) -> None:
        with pytest.raises(DataError, match="an example: the source has no tokens: give it a separator"):
            encode([Example(source="")], TextFormat(separator=""), tiny_tokenizer(), NO_LIMITS)


def pairs_of(units: list[Unit]) -> list[tuple[int, int]]:
    return [(u.example, t) for u in units for t in u.targets]


shapes = st.lists(st.lists(st.integers(1, 9), max_size=12).map(tuple), min_size=1, max_size=8).filter(any)


class TestSteps:
    @settings(max_examples=60, deadline=None)
    @given(shapes, st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
    def test_every_pair_once_an_epoch_and_as_many_a_step_as_asked(
        self, targets: list[tuple[int, ...]], pairs_per_step: int, targets_per_row: int, seed: int
    ) -> None:
        data = encoded(*((3, t) for t in targets))
        plan = steps(data, pairs_per_step=pairs_per_step, targets_per_row=targets_per_row, seed=seed)
        taken = list(itertools.islice(plan, 3 * data.num_pairs // pairs_per_step))
        assert all(len(pairs_of(step)) == pairs_per_step for step in taken)
        assert all(0 < len(unit.targets) <= targets_per_row for step in taken for unit in step)
        seen = [pair for step in taken for pair in pairs_of(step)]
        every = Counter((n, t) for n, e in enumerate(data.examples) for t in range(len(e.targets)))
        for start in range(0, len(seen) - data.num_pairs + 1, data.num_pairs):
            assert Counter(seen[start : start + data.num_pairs]) == every

    def test_the_seed_decides(self) -> None:
        first, again, other = (
            list(itertools.islice(steps(REFERENCES, pairs_per_step=5, targets_per_row=4, seed=s), 20))
            for s in (7, 7, 8)
        )
        assert first == again
        assert first != other
        epochs = steps(REFERENCES, pairs_per_step=REFERENCES.num_pairs, targets_per_row=4, seed=7)
        assert pairs_of(next(epochs)) != pairs_of(next(epochs)), "every epoch has its own order"

    def test_sources_are_mixed(self) -> None:
        """A step of many pairs reaches over many sources, though one source has most of them."""
        data = encoded((4, (3,) * 40), *((4, (3,)) for _ in range(40)))
        step = next(steps(data, pairs_per_step=40, targets_per_row=4, seed=0))
        assert len({unit.example for unit in step}) > 10

    def test_a_source_is_spread_evenly_over_as_few_rows_as_can_be(self) -> None:
        data = encoded((3, (2,) * 9), (3, (2,) * 4), (3, (2,)), (3, (2,) * 5))
        (step,) = itertools.islice(steps(data, pairs_per_step=data.num_pairs, targets_per_row=4, seed=0), 1)
        rows = [sorted(len(u.targets) for u in step if u.example == n) for n in range(4)]
        assert rows == [[3, 3, 3], [4], [1], [2, 3]]

    def test_thousands_of_steps_are_skipped_at_once(self) -> None:
        data = encoded(*((4, (3,) * 8) for _ in range(500)))

        def skip() -> None:
            plan = steps(data, pairs_per_step=16, targets_per_row=4, seed=0)
            assert len(pairs_of(next(itertools.islice(plan, 5000, None)))) == 16

        assert at_best(skip) < 2.0

    def test_no_target_at_all(self) -> None:
        with pytest.raises(DataError, match="no example has a target"):
            next(steps(encoded((3, ())), pairs_per_step=1, targets_per_row=1, seed=0))

    def test_all_units_hold_every_pair_in_the_order_of_the_data(self) -> None:
        units = all_units(REFERENCES, targets_per_row=4)
        assert pairs_of(units) == [(n, t) for n, e in enumerate(REFERENCES.examples) for t in range(len(e.targets))]
        assert [len(u.targets) for u in units] == [4, 4, 1, 1, 4, 3]


class TestMicrobatches:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)),
                 min_size=1, max_size=10),
        st.integers(1, 90), st.integers(1, 6), st.sampled_from(["packed", "padded", "encoder_decoder", "labels"]),
        st.booleans(),
    )  # fmt: skip
    def test_the_budget_holds_and_no_pair_is_lost(
        self, rows: list[tuple[int, tuple[int, ...]]], budget: int, targets_per_row: int, form: str, are_choices: bool
    ) -> None:
        data = encoded(*rows, for_encoder=form == "encoder_decoder")
        if form == "labels":
            data = replace(data, examples=tuple(tagged(e) for e in data.examples))
        elif are_choices:
            data, targets_per_row = replace(data, are_choices=True), 6
        units = all_units(data, targets_per_row)
        made = microbatches(data, units, budget, packed=form == "packed")
        assert Counter(pair for batch in made for pair in pairs_of(batch)) == Counter(pairs_of(units))
        model = MODELS["bart" if form == "encoder_decoder" else "gpt2"]
        build = {
            "packed": packed_batch,
            "padded": padded_batch,
            "encoder_decoder": encoder_decoder_batch,
            "labels": labelled_batch,
        }[form]
        for batch in made:
            whole = len(pairs_of(batch)) == 1 or (len(batch) == 1 and (data.are_choices or form == "labels"))
            assert build(data, batch, model).num_tokens <= budget or whole

    def test_rows_of_like_length_stand_together(self) -> None:
        data = encoded((9, (9,)), (2, (2,)), (9, (8,)), (2, (1,)))
        made = microbatches(data, all_units(data, 4), 34, packed=False)
        assert [[u.example for u in batch] for batch in made] == [[3, 1], [2, 0]]

    def test_thousands_of_rows_are_shared_out_at_once(self) -> None:
        data = encoded(*((200 + n % 400, (8,)) for n in range(5000)))
        units = all_units(data)
        assert sum(map(len, microbatches(data, units, 1024, packed=True))) == 5000
        assert at_best(lambda: microbatches(data, units, 1024, packed=True)) < 5

    def test_rows_without_padding_are_shared_out_evenly(self) -> None:
        data = encoded((9, (9,)), (2, (2,)), (9, (8,)), (2, (1,)))  # 17, 3, 16 and 2 tokens
        made = microbatches(data, all_units(data, 4), 34, packed=True)
        assert [[u.example for u in batch] for batch in made] == [[0, 3], [2, 1]]


MODELS = {name: tiny_model(name).requires_grad_(False) for name in ("gpt2", *ENCODER_DECODER)}


class TestLabels:
    def test_only_targets_are_scored(self) -> None:
        """The paper's labels: nothing up to and including the separator, all of the target with its end token."""
        data = encoded((4, (3, 1)))
        source, (long, short) = data.examples[0].source, data.examples[0].targets
        batch = padded_batch(data, [Unit(0, (0, 1))], MODELS["gpt2"])
        assert batch.inputs["input_ids"].tolist() == [[*source, *long[:2]], [*source, 0, 0]]
        assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
        assert batch.label.tolist() == [*long, *short]
        assert batch.positions[batch.row].tolist() == [3, 4, 5, 6 + 3]
        assert batch.pair.tolist() == [0, 0, 0, 1]

    def test_a_packed_row(self) -> None:
        data = encoded((3, (3, 2)))
        source, (first, second) = data.examples[0].source, data.examples[0].targets
        batch = packed_batch(data, [Unit(0, (0, 1))], MODELS["gpt2"])
        assert batch.inputs["input_ids"].tolist() == [[*source, *first[:2], *second[:1]]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
        assert batch.label.tolist() == [*first, *second]
        assert batch.positions[batch.row].tolist() == [2, 3, 4, 2, 5]
        parents, _window, is_target = batch.inputs["attention_mask"][0, 0].tolist()
        assert parents == [-1, 0, 1, 2, 3, 2]
        assert is_target == [0, 0, 1, 1, 1, 1], "the source's last token predicts a target's first"


@pytest.mark.parametrize("name", ENCODER_DECODER)
class TestEncoderDecoder:
    DATA = encoded((7, (5, 1, 4)), (3, (6,)), (9, (2, 7)), for_encoder=True)

    def test_a_source_is_encoded_once_and_a_target_is_a_row(self, name: str) -> None:
        batch = encoder_decoder_batch(self.DATA, [Unit(0, (0, 2)), Unit(1, (0,))], MODELS[name])
        assert batch.encoder is not None
        assert batch.source_of_row is not None
        assert batch.encoder["input_ids"].shape == (2, 7)
        assert batch.inputs["decoder_input_ids"].shape == (3, 6)
        assert batch.source_of_row.tolist() == [0, 0, 1]
        assert batch.num_tokens == 2 * 7 + 3 * 6

    def test_losses_are_those_of_the_pairs_alone(self, name: str) -> None:
        model = MODELS[name]
        together = pair_losses(model, encoder_decoder_batch(self.DATA, all_units(self.DATA, 4), model))
        alone = [
            model(input_ids=torch.tensor([e.source]), labels=torch.tensor([t])).loss * len(t)
            for e in self.DATA.examples
            for t in e.targets
        ]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


class TestReductions:
    """The paper's `objective_mode` 0 to 3, on target losses [1, 2, 3] and [2] in a row of 6 shifted positions."""

    MODES: ClassVar[dict[LossReduction, float]] = {
        "token_mean": 8 / 4,
        "example_sum": (6 + 2) / 2,
        "example_sum_over_row": (6 / 6 + 2 / 6) / 2,
        "example_sum_over_longest": (6 / 3 + 2 / 3) / 2,
    }  # fmt: skip
    SIZE = StepSize(num_pairs=2, num_target_tokens=4, longest_target=3, longest_row=6)

    def test_all_modes_are_here(self) -> None:
        assert set(self.MODES) == set(get_args(LossReduction))

    @pytest.mark.parametrize("reduction", MODES)
    def test_modes(self, reduction: LossReduction) -> None:
        losses = torch.tensor([6.0, 2.0])
        torch.testing.assert_close(
            reduce_losses(losses, self.SIZE, reduction), torch.tensor(self.MODES[reduction]), rtol=1e-6, atol=0
        )

    @pytest.mark.parametrize("reduction", MODES)
    def test_parts_of_a_step_add_up(self, reduction: LossReduction) -> None:
        parts = [reduce_losses(torch.tensor([x]), self.SIZE, reduction) for x in (6.0, 2.0)]
        torch.testing.assert_close(sum(parts), torch.tensor(self.MODES[reduction]), rtol=1e-6, atol=0)
