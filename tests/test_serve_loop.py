"""Continuous batching: a job's text is what it is alone, whoever its neighbours are."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DECODER_ONLY, METHOD_CONFIGS, NOT_ON, tiny_base, tiny_tokenizer
from serving import (
    add_prefix,
    alone,
    assert_same_text,
    end_of,
    greedy,
    kept,
    loop_over,
    run_all,
    some_prompt,
    tokens_of,
)

from antefix.attach import attached
from antefix.attachment import Attachment
from antefix.bank import Bank
from antefix.base import Base
from antefix.errors import ServingError
from antefix.methods import method_class
from antefix.prefix import Prefix
from antefix.server import loop as loop_module
from antefix.server.attached_set import AttachedSet
from antefix.server.frame import Frame, buffer_columns, column_bytes
from antefix.server.loop import Loop
from antefix.server.messages import Event, Failed, Finished, Job, PromptScored, Sampling
from antefix.server.residency import Residency

SERVED = [
    m for m in METHOD_CONFIGS
    if not set(DECODER_ONLY) & set(NOT_ON.get(m, ())) and method_class(m).acts_on_rows and m != "special_tokens"
]  # fmt: skip
"""Methods that rows of a decoder can carry."""


def bank_of_every_method(folder: Path, base: Base) -> Bank:
    bank = Bank(folder)
    for method in SERVED:
        add_prefix(bank, method, base, method)
    add_prefix(bank, "short", base, num_virtual_tokens=2, seed=2)
    if base.name not in ("tiny-gemma2",):
        add_prefix(bank, "shifted", base, positions="shifted", seed=3)
    return bank


@pytest.mark.parametrize("architecture", DECODER_ONLY)
def test_a_hundred_mixed_jobs_write_what_each_writes_alone(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(architecture)
    bank = bank_of_every_method(tmp_path / "bank", base)
    names = [(), *((name,) for name in bank)]
    dice = random.Random(4)
    count = 100 if architecture == "llama" else 25
    jobs = [
        Job(f"job {n}", some_prompt(dice.randint(1, 30), seed=n), names[n % len(names)], greedy(dice.randint(1, 20)))
        for n in range(count)
    ]
    loop = loop_over(base, bank, max_rows=9)
    coming, events = list(jobs), list[Event]()
    while coming or not loop.is_idle:
        for _ in range(dice.randint(0, 4)):
            if coming:
                loop.add(coming.pop())
        events += loop.step()
    loop.close()
    for job in jobs:
        assert isinstance(end_of(events, job.id), Finished), end_of(events, job.id)
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def bank(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    bank = Bank(tmp_path_factory.mktemp("served") / "bank")
    for seed, slots in ((1, 5), (2, 3), (3, 4)):
        add_prefix(bank, f"p{seed}", base, num_virtual_tokens=slots, seed=seed)
    add_prefix(bank, "shifted", base, positions="shifted", num_virtual_tokens=4, seed=4)
    add_prefix(bank, "infix", base, "infix")
    add_prefix(bank, "apt", base, "apt")
    add_prefix(bank, "full", base, "full")
    add_prefix(bank, "symbols", base, "special_tokens")
    return bank


def test_a_cancelled_job_frees_its_row_at_once(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank, max_rows=2)
    jobs = [Job(f"job {n}", some_prompt(4 + n, n), (f"p{n + 1}",), greedy(12, ignore_eos=True)) for n in range(3)]
    for job in jobs:
        loop.add(job)
    events = loop.step()
    assert (loop.num_running, loop.num_waiting) == (2, 1)
    assert loop.cancel("job 0") == [Finished("job 0", "cancelled", 5)]
    assert loop.num_running == 1
    assert loop.cancel("job 0") == []
    events += loop.step()
    assert (loop.num_running, loop.num_waiting) == (2, 0)
    events += run_all(loop)
    loop.close()
    for job in jobs[1:]:
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))


def test_a_waiting_job_can_be_cancelled(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank, max_rows=1)
    for n in range(2):
        loop.add(Job(f"job {n}", some_prompt(4, n), (), greedy(3)))
    loop.step()
    assert loop.cancel("job 1") == [Finished("job 1", "cancelled")]
    assert not tokens_of(run_all(loop), "job 1")


def test_texts_that_outgrow_the_buffers_go_on(base: Base, bank: Bank) -> None:
    jobs = [
        Job("wide", some_prompt(100, 1), ("p1",), greedy(50, ignore_eos=True)),
        Job("long", some_prompt(2, 2), (), greedy(250, ignore_eos=True)),
    ]
    loop = loop_over(base, bank)
    loop.add(jobs[1])
    events = loop.step()
    loop.add(jobs[0])
    events += run_all(loop)
    assert loop.num_running == 0
    loop.close()
    for job in jobs:
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))


def test_prompts_are_read_under_a_budget(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank, prompt_tokens=20)
    for n, length in enumerate((9, 10, 10, 50, 3)):
        loop.add(Job(f"job {n}", some_prompt(length, n), (), greedy(30, ignore_eos=True)))
    running = []
    while loop.num_waiting:
        loop.step()
        running.append(loop.num_running)
    assert running == [2, 3, 4, 4, 4, 5]  # 9 and 10 together are two rows of 10; the long one takes three steps
    loop.close()


@pytest.mark.parametrize("name", ["p1", "infix", "shifted"])
def test_a_long_prompt_is_read_in_pieces_while_others_write(base: Base, bank: Bank, name: str) -> None:
    loop = loop_over(base, bank, prompt_tokens=20)
    jobs = [
        Job("short", some_prompt(9, 1), ("p2",), greedy(30, ignore_eos=True)),
        Job("long", some_prompt(90, 2), (name,), greedy(8, ignore_eos=True, prompt_logprobs=True, logprobs=1)),
        Job("later", some_prompt(70, 3), (), greedy(8, ignore_eos=True)),
    ]
    loop.add(jobs[0])
    events = loop.step()
    for job in jobs[1:]:
        loop.add(job)
    for step in range(4):
        written = loop.step()
        assert [event.job for event in written] == ["short"], step
        events += written
    events += run_all(loop)
    loop.close()
    for job in jobs:
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))
    whole = loop_over(base, bank, prompt_tokens=200)
    whole.add(jobs[1])
    (in_one,) = [event for event in run_all(whole) if isinstance(event, PromptScored)]
    whole.close()
    (in_pieces,) = [event for event in events if isinstance(event, PromptScored)]
    assert in_pieces.logprobs[1:] == pytest.approx(in_one.logprobs[1:], abs=1e-4)
    assert len(in_pieces.logprobs) == len(in_pieces.top) == 90
    assert in_pieces.top[0] == in_one.top[0] == ()


def test_a_prompt_that_is_being_read_can_be_cancelled(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank, prompt_tokens=20)
    loop.add(Job("long", some_prompt(90, 2), ("p1",), greedy(8)))
    assert loop.step() == []
    assert loop.num_running == 1
    assert loop.cancel("long") == [Finished("long", "cancelled", 5)]
    assert loop.is_idle
    loop.close()


def test_what_is_attached_changes_only_with_the_set_of_prefixes(
    base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Attachment] = []
    begin = Attachment.begin
    monkeypatch.setattr(Attachment, "begin", lambda self: (begun.append(self), begin(self)))
    loop = loop_over(base, bank)
    for n in range(12):
        loop.add(Job(f"job {n}", some_prompt(4, n), (("p1",), ("p2",), ())[n % 3], greedy(3)))
        loop.step()
    run_all(loop)
    assert len(begun) == 2
    loop.close()


def test_several_prefixes_stand_side_by_side(base: Base, bank: Bank) -> None:
    job = Job("both", some_prompt(6, 1), ("p1", "p2"), greedy(10, ignore_eos=True))
    loop = loop_over(base, bank)
    loop.add(job)
    loop.add(Job("other order", job.prompt, ("p2", "p1"), job.sampling))
    loop.add(Job("first alone", job.prompt, ("p1",), job.sampling))
    events = run_all(loop)
    loop.close()
    one, two = bank["p1"], bank["p2"]
    both = Prefix(
        {name: torch.cat([tensor, two.tensors[name]], dim=1) for name, tensor in one.tensors.items()},
        one.card.model_copy(update={"config": {**one.card.config, "num_virtual_tokens": 8}}),
    )
    with attached(base.model, both):
        expected = alone(base, bank, Job("", job.prompt, (), job.sampling))
    assert_same_text(tokens_of(events, "both"), *expected)
    assert_same_text(tokens_of(events, "other order"), *expected)  # slots have no order among themselves
    assert tokens_of(events, "both") != tokens_of(events, "first alone")
    assert end_of(events, "both") == Finished("both", "length", 8)


@pytest.mark.parametrize(
    ("prefixes", "message", "kind"),
    [
        (("p1", "apt"), "'apt' is not kept as plain keys and values", "unsupported"),
        (("p1", "shifted"), "some have shifted positions and some do not", "unsupported"),
        (("infix", "p1"), "some are seen by targets alone and some by all tokens", "unsupported"),
        (("full",), "stands in the place of the base's own weights", "unsupported"),
        (("symbols",), "'symbols' (special_tokens) writes new tokens, which this server cannot spell", "unsupported"),
        (("p1", "nowhere"), "no prefix 'nowhere' in the bank", "not_found"),
        (("../p1",), "no prefix '../p1' in the bank", "not_found"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    base: Base, bank: Bank, prefixes: tuple[str, ...], message: str, kind: str
) -> None:
    loop = loop_over(base, bank)
    loop.add(Job("job", some_prompt(4, 1), prefixes, greedy(3)))
    loop.add(Job("good", some_prompt(4, 1), ("p1",), greedy(3)))
    events = run_all(loop)
    loop.close()
    end = end_of(events, "job")
    assert isinstance(end, Failed)
    assert message in end.message
    assert end.kind == kind
    assert isinstance(end_of(events, "good"), Finished)


@pytest.mark.parametrize(
    ("job", "message", "kind"),
    [
        (Job("job", some_prompt(500, 1), (), greedy(13)), "500 prompt tokens and max_tokens 13 do not fit", "too_long"),
        (Job("job", some_prompt(500, 1), ("shifted",), greedy(9)), "into the context of 508 tokens", "too_long"),
        (Job("job", (), (), greedy(3)), "the prompt is empty", "unsupported"),
        (Job("job", (5, 263), ("p1",), greedy(3)), "263 is no token of this model: it has 0 to 262", "unsupported"),
        (Job("job", (5,), (), greedy(3, logit_bias={-1: 1.0})), "-1 is no token of this model", "unsupported"),
    ],
)
def test_what_does_not_fit_is_refused(base: Base, bank: Bank, job: Job, message: str, kind: str) -> None:
    loop = loop_over(base, bank)
    loop.add(job)
    end = end_of(run_all(loop), "job")
    loop.close()
    assert isinstance(end, Failed)
    assert message in end.message
    assert end.kind == kind


def test_logits_of_no_sense_fail_their_row_alone(base: Base, tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank")
    add_prefix(bank, "good", base)
    prefix = kept(base, "ia3")
    bank.add("nonsense", Prefix({name: torch.full_like(t, 1e38) for name, t in prefix.tensors.items()}, prefix.card))
    loop = loop_over(base, bank)
    loop.add(Job("nonsense", some_prompt(4, 1), ("nonsense",), Sampling(max_tokens=3)))
    good = Job("good", some_prompt(4, 1), ("good",), greedy(3))
    loop.add(good)
    events = run_all(loop)
    loop.close()
    end = end_of(events, "nonsense")
    assert isinstance(end, Failed)
    assert end.kind == "broken_prefix"
    assert_same_text(tokens_of(events, "good"), *alone(base, bank, good))


def test_what_makes_no_sense_harms_nobody_who_takes_its_row(base: Base, tmp_path: Path) -> None:
    """Its last token spoils its columns; who joins later sees none of them, though it multiplies them by nothing."""
    bank = Bank(tmp_path / "bank")
    for name in ("one", "two", "three"):
        add_prefix(bank, name, base)
    residency = Residency(base, bank, 1 << 24)
    loop = Loop(base, residency, max_rows=3, prompt_tokens=64, cache_bytes=1 << 30)
    long, short = some_prompt(30, 1), some_prompt(4, 2)
    loop.add(Job("stays", short, ("one",), greedy(30, ignore_eos=True)))
    loop.add(Job("spoils", long, ("two",), greedy(30, ignore_eos=True)))
    loop.step()
    for layer in loop._frame.cache.layers:  # as a prefix would whose values are too large
        layer.keys[1], layer.values[1] = math.nan, math.nan
    events = loop.step()
    end = end_of(events, "spoils")
    assert isinstance(end, Failed)
    assert end.kind == "broken_prefix"
    jobs = [Job("short", short, ("three",), greedy(5)), Job("long", long, ("three",), greedy(5))]
    for job in jobs:
        loop.add(job)
    events = run_all(loop)
    loop.close()
    for job in jobs:
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))


def test_who_does_not_fit_into_memory_waits(base: Base, bank: Bank) -> None:
    room = buffer_columns(2, 30) * column_bytes(base.model)
    loop = Loop(base, Residency(base, bank, 1 << 24), max_rows=4, prompt_tokens=500, cache_bytes=room)
    jobs = [Job(str(n), some_prompt(20, n), ("p1",), greedy(10, ignore_eos=True)) for n in range(4)]
    jobs.append(Job("long", some_prompt(300, 9), ("p2",), greedy(3)))
    for job in jobs:
        loop.add(job)
    events: list[Event] = []
    most = 0
    while not loop.is_idle:
        events += loop.step()
        most = max(most, loop.num_running)
    loop.close()
    assert most == 2
    for job in jobs:  # the long one alone, though it has not the room
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))


def test_a_long_texts_buffers_are_not_kept_for_short_ones(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank, max_rows=2, prompt_tokens=1000)
    loop.add(Job("long", some_prompt(400, 1), ("p1",), greedy(3, ignore_eos=True)))
    job = Job("short", some_prompt(4, 2), ("p2",), greedy(9, ignore_eos=True))
    loop.add(job)
    events: list[Event] = []
    widths = []
    while not loop.is_idle:
        events += loop.step()
        widths += [layer.keys.shape[2] for layer in loop._frame.cache.layers[:1]]
    loop.close()
    assert widths[0] >= 400
    assert widths[-1] < 200
    assert_same_text(tokens_of(events, "short"), *alone(base, bank, job))


@pytest.mark.parametrize("seam", [(Frame, "join"), (AttachedSet, "memory_of"), (loop_module, "scores_of")])
@pytest.mark.parametrize("length", [4, 50])
def test_a_fault_while_rows_join_leaves_nobody_without_an_end(
    base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch, seam: tuple[Any, str], length: int
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    residency = Residency(base, bank, 1 << 24)
    loop = Loop(base, residency, max_rows=4, prompt_tokens=20, cache_bytes=1 << 30)
    loop.add(Job("writes", some_prompt(4, 1), ("p1",), greedy(9, ignore_eos=True)))
    events = loop.step()
    for name, tokens in (("one token", 1), ("joins", 5)):
        loop.add(Job(name, some_prompt(length, 2), ("p2",), greedy(tokens, ignore_eos=True, prompt_logprobs=True)))
    with monkeypatch.context() as broken:
        broken.setattr(*seam, breaks)
        for _ in range(8):
            events += loop.step()
    assert loop.is_idle
    assert residency.num_at_work == 0
    for name in ("writes", "one token"):
        assert end_of(events, name)
    end = end_of(events, "joins")
    assert isinstance(end, Failed)
    assert (end.kind, "no memory" in end.message) == ("internal", True)
    loop.add(Job("later", some_prompt(4, 1), ("p2",), greedy(2)))
    assert isinstance(end_of(run_all(loop), "later"), Finished)
    loop.close()


def test_a_prefix_that_cannot_go_to_work_leaves_those_at_work(
    base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Attachment.begin

    def breaks(self: Attachment) -> None:
        if len(self.prefixes) > 1:
            raise RuntimeError("no memory")
        begin(self)

    monkeypatch.setattr(Attachment, "begin", breaks)
    loop = loop_over(base, bank)
    writes = Job("writes", some_prompt(4, 1), ("p1",), greedy(9, ignore_eos=True))
    loop.add(writes)
    events = loop.step()
    loop.add(Job("joins", some_prompt(4, 2), ("p2",), greedy(3)))
    events += run_all(loop)
    loop.close()
    assert isinstance(end_of(events, "joins"), Failed)
    assert_same_text(tokens_of(events, "writes"), *alone(base, bank, writes))


def test_a_prefix_that_no_memory_is_left_to_read_fails_its_own_job_alone(
    base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Prefix.load

    def reads(path: Path) -> Prefix:
        if path.name == "p2":
            raise RuntimeError("no memory")
        return read(path)

    monkeypatch.setattr(Prefix, "load", reads)
    residency = Residency(base, bank, 1 << 24)
    loop = Loop(base, residency, max_rows=4, prompt_tokens=64, cache_bytes=1 << 30)
    for name, prefixes in (("before", ("p1",)), ("job", ("p1", "p2")), ("after", ("p3",))):
        loop.add(Job(name, some_prompt(4, 1), prefixes, greedy(3)))
    events = run_all(loop)
    loop.close()
    end = end_of(events, "job")
    assert isinstance(end, Failed)
    assert (end.kind, "no memory" in end.message) == ("internal", True)
    for name in ("before", "after"):
        assert isinstance(end_of(events, name), Finished)
    assert residency.num_at_work == 0


@pytest.mark.parametrize("architecture", ["bart", "bert"])
def test_only_decoders_are_served(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is no decoder that reads from left to right") as refused:
        loop_over(tiny_base(architecture), Bank(tmp_path))
    assert refused.value.kind == "unsupported"


HYBRIDS: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "FalconH1": {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
}
"""Bases whose layers keep states that have no columns: of some layers, of all beside attention."""


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_keeps_more_than_keys_and_values_is_not_served(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=263, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=128, **HYBRIDS[name],
    )  # fmt: skip
    base = Base(getattr(transformers, f"{name}ForCausalLM")(config).eval(), tiny_tokenizer(), "hybrid")
    with pytest.raises(ServingError, match="'hybrid' keeps more of a text than keys and values") as refused:
        loop_over(base, Bank(tmp_path))
    assert refused.value.kind == "unsupported"


def test_a_closed_loop_leaves_the_base_as_it_was(base: Base, bank: Bank) -> None:
    ids = torch.tensor([some_prompt(7, 1)])
    with torch.no_grad():
        before = base.model(ids).logits
        loop = loop_over(base, bank)
        loop.add(Job("job", some_prompt(4, 1), ("p1",), greedy(30)))
        loop.step()
        loop.close()
        assert torch.equal(base.model(ids).logits, before)
