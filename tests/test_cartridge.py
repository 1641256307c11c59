"""Cartridges: exact at the start, taught by the base that reads the document, gone on with after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DECODER_ONLY, tiny_base
from typer.testing import CliRunner

from antefix.attach import attached
from antefix.attention.hook import routed
from antefix.base import Base
from antefix.batches.batch import packed_batch, padded_batch
from antefix.batches.head import pair_losses
from antefix.cli import app
from antefix.data.encode import Encoded
from antefix.data.plan import Unit, all_units
from antefix.errors import BaseModelError, DataError, PrefixError, RecipeError, TrainingError
from antefix.methods.cartridge import Cartridge, CartridgeConfig
from antefix.prefix import Prefix
from antefix.self_study import Conversation, Study, chat_ids, converse, longest_chunk, top_tokens
from antefix.training.cartridge import STUDY_FILE, CartridgeRun, study_file, train_cartridge
from antefix.training.recipe import TrainingRecipe

TEXT = "the bear sleeps in winter and wakes in spring, hungry and slow; it eats berries and fish."


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "bear.txt"
    path.write_text(f"{TEXT}\n", encoding="utf-8")
    return path


@pytest.fixture
def llama() -> Base:
    return tiny_base("llama")


def made(base: Base, document: Path, slots: int | None, **config: object) -> Cartridge:
    return Cartridge.build(
        base, CartridgeConfig.model_validate({"document": str(document), "num_virtual_tokens": slots, **config})
    ).eval()


@pytest.mark.parametrize("architecture", [a for a in DECODER_ONLY if a not in ("mistral", "gemma2", "gemma3")])
def test_untrained_and_as_long_as_its_document_it_is_the_document_in_context(architecture: str, document: Path) -> None:
    base = tiny_base(architecture)
    ids = base.tokenizer(TEXT)["input_ids"]
    tail = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    module = made(base, document, None)
    with torch.no_grad():
        in_context = base.model(torch.cat([torch.tensor([ids] * 2), tail], dim=1)).logits[:, len(ids) :]
        with attached(base.model, module):
            found = base.model(tail).logits
    torch.testing.assert_close(found, in_context, rtol=1e-4, atol=2e-4)


def test_fewer_slots_are_the_documents_first_tokens_and_the_first_stays(llama: Base, document: Path) -> None:
    whole, few = made(llama, document, None).slots(), made(llama, document, 7).train()
    for name, pair in few.slots().items():
        torch.testing.assert_close(pair.key_GPD, whole[name].key_GPD[:, :7])
    before = {name: pair.key_GPD.clone() for name, pair in few.slots().items()}
    with attached(llama.model, few):
        llama.model(torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    torch.optim.SGD(few.parameters(), lr=10.0).step()
    for name, pair in few.slots().items():
        assert torch.equal(pair.key_GPD[:, 0], before[name][:, 0])
        assert not torch.equal(pair.key_GPD[:, 1:], before[name][:, 1:])


def test_a_teacher_gives_what_the_base_gives_with_the_document_in_context(llama: Base) -> None:
    context, answer = [5, 6, 7, 8], [9, 10, 2]
    (found,) = top_tokens(llama, [context], [answer], top=3)
    with torch.no_grad():
        wanted = torch.softmax(llama.model(torch.tensor([[*context, *answer[:-1]]])).logits[0, 3:], -1)
    assert len(found) == len(answer)
    for place, candidates in enumerate(found):
        values, tokens = wanted[place].topk(3)
        assert [t for t, _ in candidates] == tokens.tolist()
        assert [p for _, p in candidates] == pytest.approx(values.tolist(), abs=1e-5)


def test_the_loss_is_the_cross_entropy_with_the_teachers_likeliest_tokens(llama: Base) -> None:
    """By hand from logits, not normalised again; packed rows give what padded ones give."""
    top = (((9, 0.6), (4, 0.3)), ((10, 0.5), (7, 0.1)), ((2, 0.9), (3, 0.05)))
    conversation = Conversation((5, 6, 7), (9, 10, 2), top)
    data = Encoded((conversation.encoded(), replace(conversation, prompt=(8, 4)).encoded()), 0, 0)
    units = [Unit(0, (0,)), Unit(1, (0,))]
    with torch.no_grad():
        shares = torch.log_softmax(llama.model(torch.tensor([[5, 6, 7, 9, 10]])).logits[0, 2:], -1)
        wanted = -sum(p * shares[place, t] for place, some in enumerate(top) for t, p in some)
        padded = pair_losses(llama.model, padded_batch(data, units, llama.model))
        with routed(llama.model):
            packed = pair_losses(llama.model, packed_batch(data, units, llama.model))
    assert float(padded[0]) == pytest.approx(float(wanted), rel=1e-4)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


STUDY = Study(chunk_tokens=(20, 40), question_tokens=5, answer_tokens=6)


def test_self_study_is_a_function_of_its_numbers(llama: Base) -> None:
    ids = llama.tokenizer(TEXT)["input_ids"]
    first, again = (converse(llama, ids, STUDY, [0, 1, 2]) for _ in range(2))
    assert first == again
    assert first != converse(llama, ids, STUDY, [3, 4, 5])
    for conversation in first:
        assert len(conversation.top) == len(conversation.answer)
        assert list(conversation.prompt[:3]) == chat_ids(llama, "x")[:3]


def run_of(document: Path, **changes: object) -> CartridgeRun:
    training = TrainingRecipe(epochs=3, pairs_per_step=4, evaluations=3, seed=0)
    config = CartridgeConfig(num_virtual_tokens=8, document=str(document))
    given = {"conversations": 20, "study": STUDY, "training": training, **changes}
    return CartridgeRun(document=str(document), config=config, **given)  # type: ignore[arg-type]


def test_it_learns_what_the_teacher_says(llama: Base, document: Path, tmp_path: Path) -> None:
    run = run_of(document, training=TrainingRecipe(epochs=12, pairs_per_step=6, evaluations=0, learning_rate=0.1))
    prefix = train_cartridge(llama, run, tmp_path / "run")
    assert prefix.card.config["document"] == "bear.txt"
    assert TEXT not in prefix.card.model_dump_json()
    kept = Prefix.load(prefix.save(tmp_path / "kept"))
    studied = study_file(llama, run, tmp_path / "run" / STUDY_FILE)
    data = Encoded(tuple(c.encoded() for c in studied), 0, 0)
    losses = []
    for some in (made(llama, document, 8), kept):
        with torch.no_grad(), attached(llama.model, some):
            losses.append(float(pair_losses(llama.model, padded_batch(data, all_units(data), llama.model)).mean()))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("stops", [(6,), (3, 4, 5)])
def test_an_interrupted_run_ends_with_the_same_bits(
    llama: Base, document: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = train_cartridge(llama, run_of(document), tmp_path / "whole")
    for stop in stops:
        asked = iter([False] * stop + [True] * 100)
        with pytest.raises(KeyboardInterrupt):
            train_cartridge(llama, run_of(document), tmp_path / "cut", stop_requested=partial(next, asked))
    cut = train_cartridge(llama, run_of(document), tmp_path / "cut")
    assert all(torch.equal(t, cut.tensors[name]) for name, t in whole.tensors.items())


def test_fewer_conversations_are_the_first_of_more(llama: Base, document: Path, tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / STUDY_FILE
    many = study_file(llama, run_of(document, conversations=20), path, lambda done, seconds_left: told.append(done))
    assert told == [4, 8, 12, 16, 20]
    few = study_file(llama, run_of(document, conversations=8), path)
    assert few == study_file(llama, run_of(document, conversations=8), tmp_path / "anew.jsonl") == many[: len(few)]


def test_what_is_wrong_is_said(llama: Base, document: Path, tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match="bear.txt has 89 tokens, num_virtual_tokens is 90: take at most as many"):
        made(llama, document, 90)
    with pytest.raises(DataError, match="none.txt: not a readable text file"):
        made(llama, tmp_path / "none.txt", 4)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="the document is empty"):
        made(llama, tmp_path / "empty.txt", 4)
    with pytest.raises(PrefixError, match="needs its document"):
        Cartridge.build(llama, CartridgeConfig())
    with pytest.raises(ValueError, match="a cartridge starts from its document: give `document`, and no initial_text"):
        CartridgeConfig(document=str(document), initial_text="Answer")
    folder = tmp_path / "run"
    train_cartridge(llama, run_of(document), folder)
    with pytest.raises(TrainingError, match="holds conversations of another document, base or study"):
        train_cartridge(llama, run_of(document, study=replace(STUDY, seed=1)), folder)
    (folder / STUDY_FILE).write_text("{\n", encoding="utf-8")
    with pytest.raises(TrainingError, match="not a readable study file"):
        train_cartridge(llama, run_of(document), folder)
    with pytest.raises(BaseModelError, match="holds no document beside a conversation of"):
        train_cartridge(llama, run_of(document, study=replace(STUDY, answer_tokens=100_000)), tmp_path / "long")
    room = longest_chunk(llama, STUDY)
    tight = run_of(document, study=replace(STUDY, answer_tokens=STUDY.answer_tokens + room - 2))
    with pytest.raises(PrefixError, match="slots stand where 2 tokens of the base's context are left"):
        train_cartridge(llama, tight, tmp_path / "tight")
    with pytest.raises(BaseModelError, match="does not write from left to right"):
        train_cartridge(tiny_base("bert"), run_of(document), tmp_path / "encoder")
    llama.tokenizer.chat_template = None
    with pytest.raises(BaseModelError, match="no chat template"):
        converse(llama, [5] * 50, STUDY, [0])


def test_the_command_keeps_a_cartridge(
    llama: Base, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama.model.save_pretrained("tiny")
    llama.tokenizer.save_pretrained("tiny")
    command = ["cartridge", "bear.txt", "--output", "bank/bear", "--base", "tiny", "--slots", "8", "--conversations",
               "20", "--epochs", "1", "--dtype", "float32", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["prefix"] == "bank/bear"
    assert found["steps"] > 0
    assert Prefix.load("bank/bear").card.method == "cartridge"
    for wrong, told in (("--learning-rate", "learning_rate"), ("--slots", "num_virtual_tokens")):
        value = {"--learning-rate": "0", "--slots": "2000000"}[wrong]
        refused = CliRunner().invoke(app, [*command, "--output", "bank/other", wrong, value])
        assert isinstance(refused.exception, RecipeError)
        assert told in str(refused.exception)
