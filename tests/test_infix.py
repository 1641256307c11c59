"""Infix-tuning: a source is read as the base reads it, its targets see the slots."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DECODER_ONLY, ENCODER_DECODER, tiny_base, tiny_method
from test_training import prepared
from torch import Tensor
from transformers import DynamicCache

from antefix.attach import attached
from antefix.base import Base
from antefix.decoding import Decoding
from antefix.errors import PrefixError, TrainingError
from antefix.generation import generate
from antefix.methods.infix import Infix, InfixConfig
from antefix.training.prepared import Prepared
from antefix.training.recompute import recomputing
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


@pytest.mark.parametrize("lengths", [SOURCE, [SOURCE, SOURCE + 2]])
def test_a_text_that_is_fed_token_by_token_is_the_text(base: Base, lengths: int | list[int]) -> None:
    module, ids = tiny_method(base, "infix").requires_grad_(False), rows()
    with attached(base.model, module) as attachment, torch.no_grad():
        attachment.source_lengths = lengths
        whole = base.model(ids, use_cache=False).logits
        cache = DynamicCache(config=base.model.config)
        one_by_one = [base.model(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_labels_behind_a_cache_count_from_there() -> None:
    base, ids = tiny_base("llama"), rows()
    labels = ids.masked_fill(torch.arange(LENGTH) < 7, -100)
    with attached(base.model, tiny_method(base, "infix").requires_grad_(False)) as attachment, torch.no_grad():
        whole = base.model(ids, labels=labels).logits
        cache = DynamicCache(config=base.model.config)
        attachment.source_lengths = 7
        base.model(ids[:, :4], cache=cache, use_cache=True)
        attachment.source_lengths = None
        rest = base.model(ids[:, 4:], labels=labels[:, 4:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_labels_with_gaps_do_not_say_where_a_source_ends() -> None:
    base, ids = tiny_base("llama"), rows()
    labels = ids.masked_fill((torch.arange(LENGTH) == 6) | (torch.arange(LENGTH) < 3), -100)
    with (
        attached(base.model, tiny_method(base, "infix")),
        pytest.raises(PrefixError, match="between labelled tokens do not say where a source ends"),
    ):
        base.model(ids, labels=labels)


def test_recomputed_layers_have_the_roles_of_their_own_pass_or_none() -> None:
    base, ids = tiny_base("llama"), rows()
    module = tiny_method(base, "infix")
    with attached(base.model, module) as attachment, recomputing(base.model):
        for lengths in ((7, 7), (7, 3)):
            losses = []
            for length in lengths:
                attachment.source_lengths = length
                losses.append(base.model(ids).logits.square().mean())
            if lengths[0] == lengths[1]:
                sum(losses).backward()
            else:
                with pytest.raises(PrefixError, match="call backward after every pass"):
                    sum(losses).backward()
        attachment.source_lengths = 4  # and on from there
        base.model(ids).logits.square().mean().backward()


def test_an_evaluation_between_recomputed_steps_is_in_nobodys_way() -> None:
    """Other roles and no dropout there; nor does training without recomputation before it matter."""
    base, ids = tiny_base("llama"), rows()
    module = tiny_method(base, "infix", parametrisation="network", hidden_width=9, dropout=0.3)
    with attached(base.model, module) as attachment:
        for step in range(3):
            attachment.source_lengths = 3 + step
            base.model(ids).logits.square().mean().backward()
        with recomputing(base.model):
            for _ in range(2):
                with torch.no_grad():
                    attachment.source_lengths = 7
                    module.eval()
                    base.model(ids)
                attachment.source_lengths = 4
                module.train()
                base.model(ids).logits.square().mean().backward()
                assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
                module.zero_grad()


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

    @pytest.mark.parametrize("config", [{}, {"parametrisation": "network", "hidden_width": 9, "dropout": 0.3}])
    def test_an_interrupted_run_ends_with_the_same_bits(self, tmp_path: Path, config: dict[str, object]) -> None:
        def ready() -> Prepared:
            return prepared(
                tiny_base("llama"), "infix", config, keep_source_states=True, max_steps=8, checkpoint_seconds=0
            )

        whole = run(ready()).tensors
        steps = iter(range(8))
        with pytest.raises(KeyboardInterrupt):
            run(ready(), tmp_path, stop_requested=lambda: next(steps) == 3)
        resumed = run(ready(), tmp_path).tensors
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    @pytest.mark.parametrize(
        ("name", "method", "changes", "message"),
        [
            ("llama", "prefix_tuning", {}, "where they see what is learned"),
            ("llama", "infix", {"packed": False}, "needs packed rows"),
            ("bart", "infix", {}, "needs packed rows"),
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
        with pytest.raises(TrainingError, match=r"[\d,]+ source tokens take [\d.]+ GiB, 0\.0 GiB are free, and half"):
            run(prepared(tiny_base("llama"), method="infix", keep_source_states=True, max_steps=1))
