"""Parse-instructed prefixes: second texts on their way from a file to the slots, and what is left of them when kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHOD_CONFIGS, tiny_base, tiny_batch, tiny_method
from torch import Tensor

import antefix
from antefix.attach import attached
from antefix.attention.branch import Condition
from antefix.base import Base
from antefix.condition import read_condition
from antefix.data.linearise import TextFormat
from antefix.errors import DataError, GenerationError, PrefixError
from antefix.methods import method_class
from antefix.prefix import Prefix
from antefix.sites import find_sites

LAST = "layers.1.encoder_self"
"""BART's last encoder layer here."""


@pytest.fixture
def bart() -> Base:
    return tiny_base("bart")


def examples(count: int = 6) -> list[antefix.Example]:
    return [
        antefix.Example(source=f"a b{n}", targets=(f"c{n}",), condition="(S" if n % 2 else "(NP)") for n in range(count)
    ]


def logits(base: Base, batch: dict[str, Tensor], prefix: Any, condition: Condition | None = None) -> Tensor:
    with torch.no_grad(), attached(base.model, prefix) as attachment:
        attachment.condition = condition
        return base.model(**batch).logits  # type: ignore[no-any-return]


def test_a_second_text_is_what_the_bare_encoder_makes_of_it(bart: Base) -> None:
    with attached(bart.model, tiny_method(bart)):
        found = read_condition(bart.model, [(5, 6, 7), (8,)], length=4)
    assert found.is_there_BP.tolist() == [[True, True, True, False], [True, False, False, False]]
    with torch.no_grad():
        alone = bart.model.get_encoder()(input_ids=torch.tensor([[8]]))[0]
    torch.testing.assert_close(found.states_BPC[1, :1], alone[0], rtol=1e-4, atol=1e-5)
    assert not found.states_BPC[1, 1:].any()


def test_direct_is_prefix_tuning_with_these_values(bart: Base) -> None:
    """The states of a text that fills all slots, split into heads, as values of prefix-tuning's slots there."""
    module, batch = tiny_method(bart, "pip_direct").eval(), tiny_batch("bart", "right")
    condition = read_condition(bart.model, [(5, 6, 7, 8, 9)], length=5)
    tensors = module.kept_tensors()
    assert f"{LAST}.key" in tensors
    assert f"{LAST}.value" not in tensors
    heads = next(s for s in find_sites(bart.model).attention if s.name == LAST).num_heads
    tensors[f"{LAST}.value"] = condition.states_BPC[0].view(5, heads, -1).transpose(0, 1)
    found = method_class("prefix_tuning")
    plain = found.restore(find_sites(bart.model), found.Config.model_validate(METHOD_CONFIGS["prefix_tuning"]), tensors)
    torch.testing.assert_close(logits(bart, batch, module, condition), logits(bart, batch, plain), rtol=1e-4, atol=2e-4)


def test_slots_behind_a_texts_end_are_not_there(bart: Base) -> None:
    module, batch = tiny_method(bart, "pip_direct").eval(), tiny_batch("bart")
    condition = read_condition(bart.model, [(5, 6, 7)], length=5)
    before = logits(bart, batch, module, condition)
    noise = torch.where(condition.is_there_BP[..., None], condition.states_BPC, 9.0)
    assert torch.equal(logits(bart, batch, module, Condition(noise, condition.is_there_BP)), before)
    other = read_condition(bart.model, [(5, 6, 8)], length=5)
    assert not torch.allclose(logits(bart, batch, module, other), before)


def test_every_row_has_its_own_second_text(bart: Base) -> None:
    module, batch = tiny_method(bart, "pip_direct").eval(), tiny_batch("bart")
    texts = [(5, 6), (7, 8, 9), (3,), (4, 4, 4, 4)]
    together = logits(bart, batch, module, read_condition(bart.model, texts, length=5))
    for row, text in enumerate(texts):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        found = logits(bart, alone, module, read_condition(bart.model, [text], length=5))
        torch.testing.assert_close(found[0], together[row], rtol=1e-4, atol=1e-4)


def trained(base: Base, method: str, **config: Any) -> Prefix:
    training = antefix.TrainingRecipe(max_steps=4, pairs_per_step=4, evaluations=1)
    torch.manual_seed(0)
    slots = {"num_virtual_tokens": 8, "initial": "normal"}
    return antefix.train(base, examples(), dev=examples(2), training=training, method=method, **slots, **config)


def test_without_its_second_loss_indirect_is_prefix_tuning_step_for_step(bart: Base) -> None:
    plain, without, with_loss = (
        trained(bart, *given[:1], **given[1]) for given in
        (("prefix_tuning", {}), ("pip_indirect", {"mu": 0.0}), ("pip_indirect", {}))
    )  # fmt: skip
    assert plain.tensors.keys() == without.tensors.keys() == with_loss.tensors.keys()
    assert all(torch.equal(t, without.tensors[name]) for name, t in plain.tensors.items())
    assert not all(torch.equal(t, with_loss.tensors[name]) for name, t in plain.tensors.items())


def test_the_networks_of_the_second_loss_learn_at_a_rate_of_ordinary_weights(bart: Base) -> None:
    module = tiny_method(bart, "pip_indirect")
    (slots, one), (networks, less) = module.rate_scales()
    assert (one, less * module.default_learning_rate(module.config)) == (1.0, pytest.approx(1e-3))
    assert {id(p) for p in networks} == {id(p) for p in module.speaker.parameters()}
    assert {id(p) for p in (*slots, *networks)} == {id(p) for p in module.parameters() if p.requires_grad}
    ((_, one),) = tiny_method(bart, "pip_indirect", parametrisation="network").rate_scales()
    assert one == 1.0


def test_what_indirect_keeps_needs_no_second_text(bart: Base, tmp_path: Path) -> None:
    kept = Prefix.load(trained(bart, "pip_indirect").save(tmp_path / "kept"))
    with attached(bart.model, kept):
        assert len(antefix.generate(bart, ["a b1"], decoding=antefix.Decoding(max_new_tokens=3))) == 1


def test_the_second_loss_by_hand(bart: Base) -> None:
    """Networks that pass a state through say it exactly: no distance; mu scales the rest."""
    module = tiny_method(bart, "pip_indirect", mu=3.0)
    condition = read_condition(bart.model, [(5, 6, 7), (8,)], length=5)
    speaker = module.speaker
    with torch.no_grad():
        speaker.projection.weight.zero_()
        speaker.projection.bias.copy_(condition.states_BPC[1, 0])
    found = float(module.auxiliary_loss(condition).detach())
    states = condition.states_BPC[condition.is_there_BP]
    cosines = torch.cosine_similarity(states, condition.states_BPC[1, :1], dim=1).abs()
    assert found == pytest.approx(3 * float((1 - cosines).mean()), rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_direct_is_trained_and_writes_with_second_texts(bart: Base, beams: int) -> None:
    prefix = trained(bart, "pip_direct")
    decoding = antefix.Decoding(max_new_tokens=4, num_beams=beams)
    with attached(bart.model, prefix):
        together = antefix.generate(bart, examples(4), decoding=decoding)
        alone = [antefix.generate(bart, [e], decoding=decoding)[0] for e in examples(4)]
        assert together == alone
        with pytest.raises(GenerationError, match="reads a second text for every source"):
            antefix.generate(bart, ["a b1"], decoding=decoding)


def test_rows_of_other_prefixes_need_no_second_text(bart: Base) -> None:
    """Longest sources go first, so that the second batch is one of rows that read none."""
    prefix, plain = trained(bart, "pip_direct"), tiny_method(bart, "prefix_tuning").requires_grad_(False)
    decoding = antefix.Decoding(max_new_tokens=4)
    sources = [examples(1)[0], "a b1 a b1 a b1", "a b1", "b1"]
    with attached(bart.model, prefix, plain, rows=[0, 1, -1, 1]):
        mixed = antefix.generate(bart, sources, decoding=decoding, batch_size=2, text_format=prefix_format(prefix))
    with attached(bart.model, prefix):
        assert mixed[0] == antefix.generate(bart, sources[:1], decoding=decoding)[0]
    with attached(bart.model, plain):
        alone = antefix.generate(bart, [sources[1], sources[3]], decoding=decoding, text_format=prefix_format(prefix))
    assert [mixed[1], mixed[3]] == alone


def prefix_format(prefix: antefix.Prefix) -> TextFormat:
    return TextFormat.from_dict(prefix.card.text_format)


def test_a_column_holds_second_texts(tmp_path: Path) -> None:
    file = tmp_path / "para.csv"
    file.write_text("source,parse,target\nhe ran,(S (NP)),he did run\nhe ran,(S (VP)),run he did\n", encoding="utf-8")
    found = antefix.read(file, condition_column="parse")
    assert [(e.source, e.condition, e.targets) for e in found] == [
        ("he ran", "(S (NP))", ("he did run",)), ("he ran", "(S (VP))", ("run he did",))
    ]  # fmt: skip
    with pytest.raises(DataError, match="no 'pars': did you mean 'parse'"):
        antefix.read(file, condition_column="pars")


@pytest.mark.parametrize(
    ("condition", "reason"),
    [(None, "reads a second text, and the example has none"), ("x" * 9, "has 9 tokens, it may have 1 to 8")],
)
def test_a_second_text_that_is_missing_or_does_not_fit_is_named(bart: Base, condition: str, reason: str) -> None:
    wrong = [*examples(), antefix.Example(source="a", targets=("b",), condition=condition, where="para.csv, line 9")]
    training = antefix.TrainingRecipe(max_steps=1, evaluations=0)
    with pytest.raises(DataError, match=f"para.csv, line 9: .*{reason}"):
        antefix.train(bart, wrong, dev=examples(), training=training, method="pip_direct", num_virtual_tokens=8,
                      initial="normal")  # fmt: skip


@pytest.mark.parametrize(("name", "reason"), [("llama", "an encoder-decoder"), ("t5", "must split into heads")])
def test_bases_without_such_a_place_are_refused(name: str, reason: str) -> None:
    base, found = tiny_base(name), method_class("pip_direct")
    with pytest.raises(PrefixError, match=reason):
        found.build(base, found.Config.model_validate(METHOD_CONFIGS["pip_direct"]))
