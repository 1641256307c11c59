"""What serving many prefixes costs: figures of the engine, without HTTP.

    python experiments/serving.py [--rounds 5] [--tokens 64] [--bank 10000] [--resident 1000]

SmolLM2-135M in float32, prefixes of 10 slots; ratios within one run, arms taking turns:

- tokens a second of 16 clients on 16 prefixes against 16 clients on one (aim: 0.9), and against one client (aim: 4);
- time to the first token of a prefix of a bank of 10,000 that is not in memory, against one that is (aim: 50 ms more);
- the worker's memory with 1,000 prefixes in it, against what it has with none and the sum of their tensors (aim: 1.1).

Writes `results/serving.json`. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from antefix import atomic
from antefix.bank import Bank
from antefix.base import Base, load_base
from antefix.benchmarks.rounds import Spread
from antefix.methods import method_class
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.server.engine import EngineSettings, start_engine
from antefix.server.messages import Failed, Job, Sampling, Token
from antefix.server.worker_engine import WorkerEngine
from antefix.sites import find_sites

from units import ROOT, commit, made_with  # isort: skip

BASE = "smollm2-135m"
CLIENTS = 16
NUM_SLOTS = 10
PROMPT = "The Vaults is a pub near Café Adriatic. It has a customer rating of"
_numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="a client's text, in tokens")
    parser.add_argument("--bank", type=int, default=10_000, help="prefixes in the bank")
    parser.add_argument("--resident", type=int, default=1000, help="prefixes in memory, for the question of memory")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    options = parser.parse_args()
    base = load_base(BASE)
    prompt = tuple(base.tokenizer(PROMPT).input_ids)
    with tempfile.TemporaryDirectory(prefix="antefix-serving-") as folder:
        names = fill(Path(folder), base, options.bank)
        del base
        found = asyncio.run(measured(Path(folder), names, prompt, options))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    found |= {"settings": settings, "commit": commit(), "made_with": made_with()}
    atomic.write_bytes(options.out, f"{json.dumps(found, indent=1)}\n".encode())
    print(json.dumps({key: found[key] for key in ("ratios", "first_token_ms", "memory")}, indent=1))


def fill(folder: Path, base: Base, count: int) -> list[str]:
    """A bank of so many prefixes: 64 different ones, and hard links to their files under other names."""
    bank = Bank(folder)
    config = method_class("prefix_tuning").Config.model_validate({"num_virtual_tokens": NUM_SLOTS})
    record = BaseRecord(name=base.name, fingerprint=base.fingerprint)
    card = Card(method="prefix_tuning", config=config.model_dump(mode="json"), positions="in_place", base=record)
    names = [f"user-{number:05d}" for number in range(count)]
    for number, name in enumerate(names):
        if number < 64:
            bank.add(name, Prefix(tensors_of(base, number), card))
            continue
        bank.path(name).mkdir()
        for file in ("card.json", "prefix.safetensors"):
            os.link(bank.path(names[number % 64]) / file, bank.path(name) / file)
    return names


def tensors_of(base: Base, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{part}": torch.randn(site.num_key_value_heads, NUM_SLOTS, width, generator=draw)
        for site in find_sites(base.model).attention
        for part, width in (("key", site.key_width), ("value", site.value_width))
    }


async def measured(folder: Path, names: list[str], prompt: tuple[int, ...], options: Any) -> dict[str, Any]:
    settings = EngineSettings(base=BASE, bank=folder, max_rows=CLIENTS, resident_bytes=4 << 30)
    engine = await start_engine(settings)
    assert isinstance(engine, WorkerEngine)
    try:
        memory = await memory_of(engine, names[: options.resident], prompt)
        ratios, rates = await rates_of(engine, names, prompt, options)
        first = await first_tokens(engine, names, prompt, options.rounds)
        return {"ratios": ratios, "tokens_per_s": rates, "first_token_ms": first, "memory": memory}
    finally:
        await engine.stop(0.0)


async def rates_of(
    engine: WorkerEngine, names: list[str], prompt: tuple[int, ...], options: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    arms = {
        "16 clients, 16 prefixes": names[:CLIENTS],
        "16 clients, one prefix": names[:1] * CLIENTS,
        "one client": names[:1],
    }
    for clients in arms.values():  # every prefix in memory, every kernel chosen
        await tokens_per_s(engine, clients, prompt, 4)
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(options.rounds):
        for arm in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            rates[arm].append(await tokens_per_s(engine, arms[arm], prompt, options.tokens))
            print(f"round {number + 1} of {options.rounds}: {arm}, {rates[arm][-1]:.1f} tokens/s", flush=True)
    mixed, one, single = rates.values()
    return {
        "16 prefixes / one prefix, 16 clients": spread([a / b for a, b in zip(mixed, one, strict=True)]),
        "16 clients / one client, one prefix": spread([a / b for a, b in zip(one, single, strict=True)]),
        "16 clients on 16 prefixes / one client": spread([a / b for a, b in zip(mixed, single, strict=True)]),
    }, rates


async def tokens_per_s(engine: WorkerEngine, clients: list[str], prompt: tuple[int, ...], tokens: int) -> float:
    """Of clients that all begin at once and write as much as the others."""
    began = time.perf_counter()
    await asyncio.gather(*(written(engine, name, prompt, tokens) for name in clients))
    return len(clients) * tokens / (time.perf_counter() - began)


async def written(engine: WorkerEngine, name: str, prompt: tuple[int, ...], tokens: int) -> float:
    """Seconds to the first token of a text that is written to its end."""
    began, first = time.perf_counter(), None
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for event in engine.stream(Job(f"job {next(_numbers)}", prompt, (name,), sampling)):
        assert not isinstance(event, Failed), event
        if isinstance(event, Token) and first is None:
            first = time.perf_counter() - began
    assert first is not None
    return first


async def first_tokens(
    engine: WorkerEngine, names: list[str], prompt: tuple[int, ...], rounds: int
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds: idle engine, and beside eight clients that write; a prefix in memory, and one that is not."""
    found = {}
    cold_names = iter(names[::-1])
    for beside in (0, 8):
        stop = asyncio.Event()
        background = [asyncio.create_task(keep_busy(engine, name, prompt, stop)) for name in names[:beside]]
        warm, cold = [], []
        for _ in range(4 * rounds):
            warm.append(1000 * await written(engine, names[9], prompt, 1))
            cold.append(1000 * await written(engine, next(cold_names), prompt, 1))
        stop.set()
        await asyncio.gather(*background)
        more = [c - w for c, w in zip(cold, warm, strict=True)]
        where = f"beside {beside} clients"
        found[where] = {"resident": spread(warm), "not resident": spread(cold), "more": spread(more)}
    return found


async def keep_busy(engine: WorkerEngine, name: str, prompt: tuple[int, ...], stop: asyncio.Event) -> None:
    while not stop.is_set():
        await written(engine, name, prompt, 64)


async def memory_of(engine: WorkerEngine, names: list[str], prompt: tuple[int, ...]) -> dict[str, Any]:
    """Of the worker: what is its own, in MiB (`uss`: without pages that files share)."""
    await written(engine, names[0], prompt, 16)  # what the first job makes stays
    await engine.unload(names[0])
    process = psutil.Process(engine.worker_pid)
    before = process.memory_full_info().uss
    for name in names:
        await engine.load(name)
    after, tensors = process.memory_full_info().uss, engine.status().resident_bytes
    for name in names:
        await engine.unload(name)
    mib = 1 << 20
    return {
        "prefixes": len(names), "without_mib": before / mib, "with_mib": after / mib, "tensors_mib": tensors / mib,
        "with / (without + tensors)": after / (before + tensors),
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


if __name__ == "__main__":
    main()
