"""Prefixes in memory: bounded by bytes, the longest unused go first, and files are followed."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_base
from serving import add_prefix, end_of, greedy, kept, loop_over, run_all, some_prompt, tokens_of

from antefix.bank import Bank
from antefix.base import Base
from antefix.errors import ServingError
from antefix.server.heap import give_back, settle
from antefix.server.messages import Failed, Finished, Job
from antefix.server.residency import Residency

SLOT_BYTES = 3 * 2 * 2 * 10 * 4
"""Of one slot: layers, keys and values, heads, width, float32."""


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


@pytest.fixture
def bank(base: Base, tmp_path: Path) -> Bank:
    """Prefixes a to d with 2 slots each, and `big` with 5."""
    bank = Bank(tmp_path / "bank")
    for seed, name in enumerate("abcd"):
        add_prefix(bank, name, base, num_virtual_tokens=2, seed=seed)
    add_prefix(bank, "big", base, num_virtual_tokens=5)
    return bank


def names_in(residency: Residency) -> list[str]:
    return [one.name for one in residency.resident()]


def test_the_longest_unused_go_first_by_bytes(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=7 * SLOT_BYTES)
    for name in "abc":
        residency.load(name)
    assert residency.num_bytes == 6 * SLOT_BYTES
    residency.load("a")
    residency.load("d")
    assert names_in(residency) == ["c", "a", "d"]
    residency.load("big")  # five slots beside two: one is left
    assert names_in(residency) == ["d", "big"]
    assert residency.num_bytes == 7 * SLOT_BYTES


def test_what_is_pinned_or_at_work_stays(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=5 * SLOT_BYTES)
    residency.pin("a")
    taken = residency.take(["b"])
    with pytest.raises(ServingError, match="no memory for the prefix 'c'") as refused:
        residency.load("c")
    assert refused.value.kind == "overloaded"
    assert names_in(residency) == ["a", "b"]
    residency.give_back(taken)
    residency.load("c")
    assert names_in(residency) == ["a", "c"]
    residency.unload("a")
    residency.load("d")
    assert names_in(residency) == ["c", "d"]


def test_a_prefix_larger_than_the_memory_is_refused(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=4 * SLOT_BYTES)
    residency.load("a")
    with pytest.raises(ServingError, match=rf"'big' takes {5 * SLOT_BYTES:,} bytes, there are {4 * SLOT_BYTES:,}"):
        residency.load("big")
    assert names_in(residency) == ["a"]


def test_prefixes_of_one_job_do_not_drop_each_other(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=3 * SLOT_BYTES)
    with pytest.raises(ServingError, match="no memory for the prefix 'b'"):
        residency.take(["a", "b"])
    assert residency.num_at_work == 0


def test_unload_forgets_a_pinned_prefix_too(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=9 * SLOT_BYTES)
    residency.pin("a")
    (one,) = residency.resident()
    assert (one.name, one.num_bytes, one.pinned, one.at_work) == ("a", 2 * SLOT_BYTES, True, 0)
    residency.unload("a")
    assert residency.resident() == ()
    assert residency.num_bytes == 0
    with pytest.raises(ServingError, match="the prefix 'a' is not in memory") as refused:
        residency.unload("a")
    assert refused.value.kind == "not_found"


def test_a_prefix_that_changed_on_disk_is_read_again(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank)
    jobs = [Job(f"job {n}", some_prompt(6, 1), ("a",), greedy(12, ignore_eos=True)) for n in range(3)]
    loop.add(jobs[0])
    loop.step()
    kept(base, num_virtual_tokens=5, seed=9).save(bank.path("a"), overwrite=True)
    loop.add(jobs[1])  # beside one that goes on with the old one
    events = run_all(loop)
    loop.add(jobs[2])
    events += run_all(loop)
    loop.close()
    assert tokens_of(events, "job 0") != tokens_of(events, "job 1") == tokens_of(events, "job 2")
    assert [end_of(events, job.id) for job in jobs] == [
        Finished("job 0", "length", 2), Finished("job 1", "length", 5), Finished("job 2", "length", 5),
    ]  # fmt: skip


def test_a_prefix_that_was_removed_is_not_found(base: Base, bank: Bank) -> None:
    residency = Residency(base, bank, max_bytes=9 * SLOT_BYTES)
    residency.load("a")
    shutil.rmtree(bank.path("a"))
    with pytest.raises(ServingError, match="no prefix 'a' in the bank") as refused:
        residency.load("a")
    assert refused.value.kind == "not_found"
    assert residency.num_bytes == 0


def test_a_broken_file_fails_its_request_alone(base: Base, bank: Bank) -> None:
    tensors = bank.path("a") / "prefix.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    loop = loop_over(base, bank)
    loop.add(Job("broken", some_prompt(6, 1), ("a",), greedy(3)))
    loop.add(Job("good", some_prompt(6, 1), ("b",), greedy(3)))
    events = run_all(loop)
    loop.close()
    end = end_of(events, "broken")
    assert isinstance(end, Failed)
    assert end.kind == "broken_prefix"
    assert end.message.startswith("the prefix 'a' cannot be used: ")
    assert "not the bytes that were kept" in end.message
    assert isinstance(end_of(events, "good"), Finished)


def test_a_prefix_of_another_base_is_refused(base: Base, bank: Bank) -> None:
    add_prefix(bank, "foreign", tiny_base("llama", seed=1))
    with pytest.raises(ServingError, match="'foreign' cannot be used: this prefix was trained for") as refused:
        Residency(base, bank, 1 << 20).load("foreign")
    assert refused.value.kind == "broken_prefix"


def test_a_prefix_is_in_memory_once(base: Base, bank: Bank) -> None:
    carried = Residency(base, bank, 1 << 20).load("big")
    own = {parameter.data_ptr() for parameter in carried.module.parameters()}
    assert sum(p.numel() * p.element_size() for p in carried.module.parameters()) == carried.num_bytes
    assert {t.data_ptr() for slots in carried.module.slots().values() for t in slots} == own
    assert not any(p.requires_grad for p in carried.module.parameters())
    assert all(p.dtype == torch.float32 for p in carried.module.parameters())


def test_circles_are_given_back_but_for_what_was_settled() -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        old = Ring()
        settle()
        rings = [weakref.ref(old), weakref.ref(Ring())]
        del old
        give_back()
        assert [ring() is None for ring in rings] == [False, True]
    finally:
        gc.unfreeze()
        gc.enable()
