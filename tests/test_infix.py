"""Infix-tuning: a source is read as the base reads it, its targets see the slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import DECODER_ONLY, ENCODER_DECODER, tiny_base, tiny_method
from test_training import prepared
from torch import Tensor

from antefix.attach import attached
from antefix.base import Base
from antefix.decoding import Decoding
from antefix.errors import PrefixError, TrainingError
from antefix.generation import generate
from antefix.methods.infix import Infix, InfixConfig
from antefix.training.run import run

SOURCE, LENGTH = 5, 9


@pytest.fixture(params=DECODER_ONLY)
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


def rows() -> Tensor:
    return torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states(base: Base, ids: Tensor) -> tuple[Tensor, ...]:
    return base.model(ids, output_hidden_states=True, use_cache=False).hidden_states


def test_before_its_last_token_a_source_is_what_it_is_for_the_base(base: Base) -> None:
    bare = states(base, rows())
    with attached(base.model, tiny_method(base, "infix")) as attachment:
        attachment.source_lengths = SOURCE
        found = states(base, rows())
    for ours, theirs in zip(found, bare, strict=True):
        torch.testing.assert_close(ours[:, : SOURCE - 1], theirs[:, : SOURCE - 1], rtol=1e-5, atol=1e-5)
    assert float((found[-1] - bare[-1])[:, SOURCE - 1 :].abs().amin(dim=(0, 2)).max()) > 0
    assert float((found[-1] - bare[-1])[:, SOURCE - 1].abs().max()) > 0.1, "its last token sees the slots"


def test_with_a_source_of_one_token_it_is_prefix_tuning(base: Base) -> None:
    infix, prefix = (tiny_method(base, method) for method in ("infix", "prefix_tuning"))
    with attached(base.model, prefix):
        wanted = states(base, rows())[-1]
    for length in (0, 1):
        with attached(base.model, infix) as attachment:
            attachment.source_lengths = length
            assert torch.equal(states(base, rows())[-1], wanted)


def test_labels_say_where_a_source_ends(base: Base) -> None:
    ids = rows()
    labels = ids.clone()
    labels[0, :SOURCE], labels[1, : SOURCE + 2] = -100, -100
    with attached(base.model, tiny_method(base, "infix")) as attachment, torch.no_grad():
        found = base.model(ids, labels=labels).logits
        attachment.source_lengths = [SOURCE, SOURCE + 2]
        assert torch.equal(base.model(ids).logits, found)
        attachment.source_lengths = SOURCE
        assert not torch.equal(base.model(ids).logits, found)


def test_what_is_not_known_is_asked_for() -> None:
    base = tiny_base("llama")
    with attached(base.model, tiny_method(base, "infix")) as attachment:
        with pytest.raises(
            PrefixError, match=r"where the sources end: give `labels`, or set attachment.source_lengths"
        ):
            states(base, rows())
        attachment.source_lengths = [4, 4, 4]
        with pytest.raises(PrefixError, match=r"2 rows, attachment.source_lengths has 3"):
            states(base, rows())


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_the_encoder_of_an_encoder_decoder_is_the_bases(name: str) -> None:
    base = tiny_base(name)
    ids = rows()
    bare = base.model(input_ids=ids, decoder_input_ids=ids)
    with attached(base.model, tiny_method(base, "infix")):
        found = base.model(input_ids=ids, decoder_input_ids=ids)
    assert torch.equal(found.encoder_last_hidden_state, bare.encoder_last_hidden_state)
    assert float((found.logits - bare.logits).detach().abs().max()) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_says_where_the_sources_end(name: str) -> None:
    base = tiny_base(name)
    decoding = Decoding(num_beams=1, max_new_tokens=4, min_new_tokens=4)
    with attached(base.model, tiny_method(base, "infix")) as attachment:
        texts = generate(base, ["some words", "a few more words"], decoding=decoding)
        alone = [generate(base, [text], decoding=decoding)[0] for text in ("some words", "a few more words")]
        assert attachment.source_lengths is None, "said for one call, not for the next"
    assert texts == alone
    assert texts != generate(base, ["some words", "a few more words"], decoding=decoding)


def test_an_encoder_has_no_targets() -> None:
    with pytest.raises(PrefixError, match="no site of kind self, cross"):
        Infix.build(tiny_base("bert"), InfixConfig(initial="normal"))


class TestKeptSources:
    def test_a_run_learns_the_same(self) -> None:
        both = [
            run(prepared(tiny_base("llama"), method="infix", keep_source_states=keep, max_steps=4))
            for keep in (False, True)
        ]
        assert both[0].tensors.keys() == both[1].tensors.keys()
        for key, tensor in both[0].tensors.items():
            torch.testing.assert_close(tensor, both[1].tensors[key], atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize(
        ("name", "method", "changes", "message"),
        [
            ("llama", "prefix_tuning", {}, "where they see what is learned"),
            ("llama", "infix", {"packed": False}, "takes no packed rows"),
            ("bart", "infix", {}, "takes no packed rows"),
            ("mistral", "infix", {}, "looks back on 4 tokens"),
        ],
    )
    def test_what_cannot_be_kept_is_refused(
        self, name: str, method: str, changes: dict[str, bool], message: str
    ) -> None:
        with pytest.raises(TrainingError, match=message):
            run(prepared(tiny_base(name), method=method, keep_source_states=True, max_steps=1, **changes))

    def test_more_than_fits_into_memory_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 10))
        with pytest.raises(
            TrainingError, match=r"[\d,]+ source tokens take [\d.]+ GiB, 0\.0 GiB are free; leave it out"
        ):
            run(prepared(tiny_base("llama"), method="infix", keep_source_states=True, max_steps=1))
