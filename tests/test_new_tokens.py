"""New tokens: written as symbols, read and scored by embeddings of their own, and the base's rows left alone."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_base, tiny_method

import antefix
from antefix.attach import attached
from antefix.errors import GenerationError, PrefixError, RecipeError
from antefix.generation import generate_each, terminal_streamer
from antefix.methods import method_class

WORDS = 263
FRAMES = [
    antefix.Example(source=f"go to {place} {when}", targets=(f"[IN:GO go to [SL:TO {place} ] {when} ]",))
    for place in ("kent", "york", "hull") for when in ("now", "soon")
]  # fmt: skip


def test_symbols_are_one_token_each_and_come_back() -> None:
    base = tiny_base("llama")
    tokenizer = base.tokenizer_with(["[IN:GO", "[IN:GO_ON", "]"])
    text = "[IN:GO_ON walk [IN:GO to ] the end ]"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= WORDS] == [WORDS + 1, WORDS, WORDS + 2, WORDS + 2]
    assert tokenizer.decode(ids) == text
    assert tokenizer("plain")["input_ids"] == base.tokenizer("plain")["input_ids"]
    assert tokenizer.pad_token_id == base.tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_by_hand(name: str) -> None:
    """A base whose embeddings and head have the new rows for good computes the same."""
    base = tiny_base(name)
    module = tiny_method(base, "special_tokens")
    rows = module.kept_tensors()["embeddings"]
    ids = torch.tensor([[5, WORDS + 1, 9, WORDS, WORDS + 2]])
    with attached(base.model, module), torch.no_grad():
        found = base.model(input_ids=ids).logits
    wide = tiny_base(name).model
    wide.resize_token_embeddings(WORDS + 3, mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[WORDS:] = rows
        wide.get_output_embeddings().weight[WORDS:] = rows
        torch.testing.assert_close(found, wide(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_row_reads_and_scores_its_own_new_tokens_alone() -> None:
    """Of two prefixes with three and one; what a row does not have is as unlikely as can be."""
    base, found = tiny_base("llama"), method_class("special_tokens")
    three = tiny_method(base, "special_tokens")
    one = found.build(base, found.Config.model_validate({"tokens": ["<only>"], "initial_noise": 8.0}))
    rows = [torch.tensor([[5, WORDS, 9]]), torch.tensor([[7, WORDS + 2, WORDS]])]
    alone = []
    for module, ids in zip((one, three), rows, strict=True):
        with attached(base.model, module), torch.no_grad():
            alone.append(base.model(input_ids=ids).logits[0])
    with attached(base.model, three, one, rows=[1, 0]), torch.no_grad():
        mixed = base.model(input_ids=torch.cat(rows)).logits
    torch.testing.assert_close(mixed[0, :, : WORDS + 1], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-4)
    assert (mixed[0, :, WORDS + 1 :] == -torch.inf).all()


def test_symbols_are_found_in_the_targets_trained_and_written() -> None:
    base = tiny_base("llama")
    before = [p.detach().clone() for p in base.model.parameters()]
    training = antefix.TrainingRecipe(max_steps=300, pairs_per_step=6, evaluations=2, weight_decay=0.1)
    config = {"prefix_tuning": {"num_virtual_tokens": 6, "initial": "normal"}, "special_tokens": {}}
    prefix = antefix.train(
        base, FRAMES, dev=FRAMES, training=training, method="prefix_tuning+special_tokens",
        decoding=antefix.Decoding(max_new_tokens=40), **config,
    )  # fmt: skip
    assert prefix.card.config["special_tokens"]["tokens"] == ["[IN:GO", "[SL:TO", "]"]
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters(), strict=True)), (
        "decay moves no old row"
    )
    with attached(base.model, prefix):
        written = antefix.generate(base, FRAMES)
    assert written[0].startswith("[IN:GO")
    assert "]" in written[0]
    with attached(base.model, prefix, tiny_method(base), rows=[0, -1, 1, 0]):
        mixed = antefix.generate(base, FRAMES[:4])
    assert (mixed[0], mixed[3]) == (written[0], written[3])
    assert "[IN:GO" not in mixed[1] + mixed[2]


def test_a_pattern_may_have_groups() -> None:
    config = method_class("special_tokens").Config.model_validate({"pattern": r"\[(IN|SL):[A-Z_]+|\]"})
    assert config.completed([FRAMES[0].targets[0]]).tokens == ("[IN:GO", "[SL:TO", "]")
    empty = method_class("special_tokens").Config.model_validate({"pattern": "x*"})
    with pytest.raises(PrefixError, match="finds no symbol"):
        empty.completed(["abc"])


def test_a_terminal_shows_symbols(capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base("llama")
    with attached(base.model, tiny_method(base, "special_tokens")):
        streamer = terminal_streamer(base)
    streamer.put(torch.tensor([[5, 6]]))
    for token in (WORDS, *base.tokenizer(" go ")["input_ids"], WORDS + 2):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "[IN:GO go ]\n"


def test_a_first_embedding_is_the_mean_of_its_words() -> None:
    base = tiny_base("llama")
    found = method_class("special_tokens")
    config = found.Config.model_validate({"tokens": ["[IN:GET_ON"], "initial_noise": 0.0})
    ids = base.tokenizer(" get on", add_special_tokens=False)["input_ids"]
    wanted = base.model.get_input_embeddings().weight[ids].mean(dim=0)
    torch.testing.assert_close(found.build(base, config).kept_tensors()["embeddings"][0], wanted)


def test_what_cannot_be_is_told() -> None:
    base = tiny_base("llama")
    texts = [antefix.Example(source="a", targets=("b",))] * 2
    with pytest.raises(PrefixError, match="finds no symbol in the training targets"):
        antefix.train(base, texts, method="special_tokens")
    with pytest.raises(
        RecipeError, match=r"'config.pattern' is .*: no regular expression \(unterminated character set"
    ):
        antefix.train(base, FRAMES, method="special_tokens", pattern="[A")
    with pytest.raises(PrefixError, match="new tokens need a causal base"):
        antefix.train(tiny_base("bart"), texts, method="special_tokens", tokens=["x"])
    with pytest.raises(PrefixError, match="name the new tokens, each once"):
        antefix.train(base, texts, method="special_tokens", tokens=["x", "x"])
    alone, assistant = tiny_method(base, "special_tokens"), tiny_base("llama").model
    message = "an assistant model does not know the new tokens"
    with attached(base.model, alone), pytest.raises(GenerationError, match=message):
        list(generate_each(base, texts, assistant_model=assistant))
    message = "a row holds a new token that its prefix does not have"
    with attached(base.model, alone), pytest.raises(PrefixError, match=message):
        base.model(torch.tensor([[5, WORDS + 3], [5, 6]]))
