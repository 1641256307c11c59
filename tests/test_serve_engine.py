"""The engine over a worker process: streams, orders, and what happens when the worker dies. Nothing may hang."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from conftest import tiny_base
from serving import add_prefix, alone, assert_same_text, greedy, kept, some_prompt, tokens_of

from antefix.bank import Bank
from antefix.base import Base
from antefix.errors import ServingError
from antefix.server import heap, worker
from antefix.server.engine import Engine, EngineSettings, start_engine
from antefix.server.messages import Event, Failed, Finished, Job, Ready, Sampling, Token
from antefix.server.worker_engine import WorkerEngine

T = TypeVar("T")
Run = Callable[[Callable[[], Awaitable[Any]]], Any]
"""Runs a test's body; one that hangs is cut off."""
PATIENCE_S = 300
"""Longer than anything here takes on a busy machine; what takes longer hangs."""
FOREVER = greedy(400, ignore_eos=True)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a bank as files."""
    folder = tmp_path_factory.mktemp("served")
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    for seed, name in ((1, "menus"), (2, "sport")):
        add_prefix(Bank(folder / "bank"), name, base, seed=seed)
    return folder


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests, so that an engine can be shared."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(folder: Path, runner: asyncio.Runner) -> Iterator[WorkerEngine]:
    """Two rows, one job may wait. Starting one takes seconds: who leaves it as it was shares it."""
    settings = EngineSettings(
        base=str(folder / "base"), bank=folder / "bank", num_threads=1, max_rows=2, max_waiting=1
    )  # fmt: skip
    engine = runner.run(start_engine(settings))
    assert isinstance(engine, WorkerEngine)
    yield engine
    runner.run(engine.stop(0.0))


@pytest.fixture
def run(runner: asyncio.Runner) -> Run:
    def in_time(body: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:
            async with asyncio.timeout(PATIENCE_S):
                return await body()

        return runner.run(awaited())

    return in_time


@asynccontextmanager
async def engine_over(folder: Path, **changes: Any) -> AsyncIterator[WorkerEngine]:
    settings = EngineSettings(base=str(folder / "base"), bank=folder / "bank", num_threads=1, **changes)
    engine = await start_engine(settings)
    assert isinstance(engine, WorkerEngine)
    try:
        yield engine
    finally:
        await engine.stop(0.0)


async def all_of(engine: Engine, job: Job) -> list[Event]:
    return await rest_of(engine.stream(job))


async def rest_of(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_streams_orders_and_status(base: Base, folder: Path, engine: WorkerEngine, run: Run) -> None:
    jobs = [
        Job("one", some_prompt(6, 1), ("menus",), greedy(9)),
        Job("two", some_prompt(20, 2), ("sport",), greedy(5)),
        Job("three", some_prompt(3, 3), (), greedy(12)),
    ]

    async def body() -> list[list[Event]]:
        assert engine.alive
        streams = await asyncio.gather(*(all_of(engine, job) for job in jobs))
        await engine.load("menus")
        await engine.pin("sport")
        assert [(one.name, one.pinned) for one in engine.resident()] == [("menus", False), ("sport", True)]
        with pytest.raises(ServingError, match="no prefix 'nowhere' in the bank") as refused:
            await engine.load("nowhere")
        assert refused.value.kind == "not_found"
        await engine.unload("menus")
        (sport,) = engine.resident()
        status = engine.status()
        assert (status.state, status.alive, status.max_rows, status.batch_fill) == ("running", True, 2, 0.0)
        assert status.resident_bytes == sport.num_bytes
        assert status.tokens_per_s > 0
        open_one = engine.stream(Job("twice", (5,), (), FOREVER))
        await anext(open_one)
        with pytest.raises(ValueError, match="a job 'twice' is open"):
            await all_of(engine, Job("twice", (5,), (), FOREVER))
        await open_one.aclose()
        await engine.unload("sport")  # pinned or not
        assert engine.resident() == ()
        return list(streams)

    for job, events in zip(jobs, run(body), strict=True):
        assert isinstance(events[-1], Finished)
        assert_same_text(tokens_of(events, job.id), *alone(base, Bank(folder / "bank"), job))


def test_a_client_that_goes_frees_its_row(engine: WorkerEngine, run: Run) -> None:
    async def body() -> None:
        tasks = [asyncio.create_task(all_of(engine, Job(f"gone {n}", (5,), ("menus",), FOREVER))) for n in range(2)]
        await until(lambda: engine.status().running == 2)
        waiting = asyncio.create_task(all_of(engine, Job("waits", (5,), (), greedy(2, ignore_eos=True))))
        await until(lambda: engine.status().waiting == 1)
        (refused,) = await all_of(engine, Job("one too many", (5,), (), greedy(2)))
        assert isinstance(refused, Failed)
        assert refused.kind == "overloaded"
        assert "3 requests are open, which is the most" in refused.message
        for task in tasks:
            task.cancel()
        assert isinstance((await waiting)[-1], Finished)
        await until(lambda: engine.status().running == 0)

    run(body)


def test_a_worker_that_is_killed_fails_its_streams_and_is_restarted(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with engine_over(folder) as engine:
            await engine.pin("sport")
            task = asyncio.create_task(all_of(engine, Job("job", (5,), ("menus",), FOREVER)))
            await until(lambda: engine.status().running == 1)
            pid = engine.worker_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            last = (await task)[-1]
            assert time.monotonic() - killed_at < 5.0
            assert isinstance(last, Failed)
            assert (last.kind, last.message) == (
                "unavailable",
                "the engine's worker died while it worked on this; ask again",
            )
            assert not engine.alive
            assert engine.status().state == "restarting"
            assert engine.resident() == ()
            (refused,) = await all_of(engine, Job("too early", (5,), (), greedy(2)))
            assert isinstance(refused, Failed)
            assert refused.kind == "unavailable"
            with pytest.raises(ServingError, match="takes no orders now"):
                await engine.load("menus")
            await until(lambda: engine.alive)
            assert engine.worker_pid != pid
            assert engine.status().num_restarts == 1
            await engine.load("menus")
            assert [(one.name, one.pinned) for one in engine.resident()] == [("sport", True), ("menus", False)]
            assert isinstance((await all_of(engine, Job("again", (5,), ("menus",), greedy(3))))[-1], Finished)

    run(body)


def test_a_worker_that_hangs_is_ended_and_started_again(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with engine_over(folder, silent_s=2.0) as engine:
            pid = engine.worker_pid
            assert pid is not None
            await asyncio.sleep(3.0)
            assert engine.worker_pid == pid  # to have nothing to do is not to hang
            task = asyncio.create_task(all_of(engine, Job("job", (5,), ("menus",), FOREVER)))
            await until(lambda: engine.status().running == 1)
            os.kill(pid, signal.SIGSTOP)
            last = (await task)[-1]
            assert isinstance(last, Failed)
            assert last.kind == "unavailable"
            await until(lambda: engine.alive)
            assert engine.worker_pid != pid
            assert isinstance((await all_of(engine, Job("again", (5,), ("menus",), greedy(3))))[-1], Finished)

    run(body)


def test_a_process_that_cannot_be_started_counts_as_a_death(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with engine_over(folder, max_restarts=2) as engine:
            assert engine.worker_pid is not None

            def no_memory(process: Any) -> None:
                raise OSError("Cannot allocate memory")

            monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", no_memory)
            os.kill(engine.worker_pid, signal.SIGKILL)
            await until(lambda: engine.status().state == "dead")

    run(body)


def test_too_many_deaths_in_a_row_are_the_end(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with engine_over(folder, max_restarts=0) as engine:
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGKILL)
            await until(lambda: engine.status().state == "dead")
            (refused,) = await all_of(engine, Job("job", (5,), (), greedy(2)))
            assert isinstance(refused, Failed)
            assert (refused.kind, refused.message) == ("unavailable", "the engine has stopped")

    run(body)


def test_a_worker_whose_parent_is_gone_ends_in_the_middle_of_its_work(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    settings = EngineSettings(base=str(folder / "base"), bank=folder / "bank", num_threads=1)
    process = context.Process(target=worker.run, args=(there, settings))
    process.start()
    there.close()
    assert Ready() in here.recv()
    here.send(Job("job", (5,), ("menus",), FOREVER))
    while not any(isinstance(report, Token) for report in here.recv()):
        pass
    here.close()  # as the system does when a process dies
    process.join(PATIENCE_S)
    assert process.exitcode == 0


def test_stop_lets_open_jobs_end(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with engine_over(folder) as engine:
            pid = engine.worker_pid
            assert pid is not None
            stream = engine.stream(Job("job", (5,), (), FOREVER))
            await anext(stream)  # it is at work; the status, told now and then, may miss a job that is soon done
            task = asyncio.create_task(rest_of(stream))
            stopping = asyncio.create_task(engine.stop(PATIENCE_S))
            await until(lambda: engine.status().state == "stopping")
            (refused,) = await all_of(engine, Job("late", (5,), (), greedy(2)))
            assert isinstance(refused, Failed)
            assert (refused.kind, refused.message) == ("unavailable", "the server is stopping")
            assert len(await task) == FOREVER.max_tokens, "the other tokens, and that it is finished"
            await stopping
            assert engine.status().state == "dead"
            assert not psutil.pid_exists(pid)

    run(body)


def test_stop_without_grace_fails_open_jobs(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with engine_over(folder) as engine:
            task = asyncio.create_task(all_of(engine, Job("job", (5,), (), FOREVER)))
            await until(lambda: engine.status().running == 1)
            began = time.monotonic()
            await engine.stop(0.0)
            assert time.monotonic() - began < 10
            last = (await task)[-1]
            assert isinstance(last, Failed)
            assert (last.kind, last.message) == ("unavailable", "the server is stopping")

    run(body)


def test_a_broken_prefix_ends_nothing(base: Base, folder: Path, engine: WorkerEngine, run: Run) -> None:
    bank = Bank(folder / "bank")
    kept(base).save(bank.path("broken"))
    (bank.path("broken") / "card.json").write_text("{", encoding="utf-8")

    async def body() -> None:
        (failed,) = await all_of(engine, Job("broken", (5,), ("broken",), greedy(2)))
        assert isinstance(failed, Failed)
        assert failed.kind == "broken_prefix"
        assert "not a readable card" in failed.message
        assert isinstance((await all_of(engine, Job("good", (5,), ("menus",), greedy(2))))[-1], Finished)

    run(body)


def test_the_worker_logs_as_the_server_does(
    base: Base, folder: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    biases: Any = {5: "no number"}  # what the server would never send

    async def body() -> list[Event]:
        async with engine_over(folder) as engine:
            return await all_of(engine, Job("job", (5,), (), Sampling(max_tokens=3, logit_bias=biases)))

    (failed,) = run(body)
    assert isinstance(failed, Failed)
    assert failed.kind == "internal"
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert line["level"] == "error"
    assert "Error" in line["traceback"]


def test_a_base_that_cannot_be_loaded_is_named(tmp_path: Path, run: Run) -> None:
    async def body() -> None:
        with pytest.raises(ServingError, match=f"cannot load the base '{tmp_path}'"):
            await start_engine(EngineSettings(base=str(tmp_path), bank=tmp_path))

    run(body)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_between_what_is_in_use_is_given_back() -> None:
    process, size = psutil.Process(), 60_000  # too small to be a mapping of its own
    blocks = [bytearray(size) for _ in range(3000)]
    blocks = blocks[::50]  # these keep the heap from shrinking
    before = process.memory_info().rss
    heap.give_back()
    assert before - process.memory_info().rss > 2000 * size
    assert all(not any(block) for block in blocks)
