"""What serving many prefixes costs: `antefix serve` asked over HTTP by streaming clients.

    python experiments/serving.py [--rounds 5] [--tokens 64] [--bank 10000] [--resident 1000]

SmolLM2-135M in float32, prefixes of 10 slots, each with files of its own; ratios within one run, arms taking turns:

- tokens a second of 16 clients on 16 prefixes against 16 clients on one (aim: 0.9), and against one client (aim: 4);
- time to the first token of a prefix of a bank of 10,000 that is not in memory, against one that is (aim: 50 ms more);
  its files were just written, so the system still has them in its own cache;
- the memory of the server's processes with 1,000 prefixes read, against the tensors of these and the base's weights
  (aim: 1.1), and against the same processes before.

Writes `results/serving.json`. A quarter of an hour on two cores, and 5 GB on the disk for the bank.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch

from antefix import atomic
from antefix.bank import Bank
from antefix.base import Base, load_base
from antefix.benchmarks.rounds import Spread
from antefix.methods import method_class
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.sites import find_sites

from served import own_bytes, served  # isort: skip
from units import ROOT, commit, made_with  # isort: skip

BASE = "smollm2-135m"
CLIENTS = 16
NUM_SLOTS = 10
PROMPT = "The Vaults is a pub near Café Adriatic. It has a customer rating of"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="a client's text, in tokens")
    parser.add_argument("--bank", type=int, default=10_000, help="prefixes in the bank")
    parser.add_argument("--resident", type=int, default=1000, help="prefixes in memory, for the question of memory")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    options = parser.parse_args()
    base = load_base(BASE)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    with tempfile.TemporaryDirectory(prefix="antefix-serving-") as folder:
        names, prefix_bytes = fill(Path(folder) / "bank", base, options.bank)
        del base
        words = ["--base", BASE, "--bank", f"{folder}/bank", "--dtype", "float32", "--max-rows", str(CLIENTS)]
        with open(f"{folder}/log", "w") as log, served([*words, "--resident-mib", "4096"], log) as (process, address):
            found = asyncio.run(measured(address, process.pid, names, weights, prefix_bytes, options))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    found |= {"settings": settings, "commit": commit(), "made_with": made_with()}
    atomic.write_bytes(options.out, f"{json.dumps(found, indent=1)}\n".encode())
    print(json.dumps({key: found[key] for key in ("ratios", "first_token_ms", "memory")}, indent=1))


def fill(folder: Path, base: Base, count: int) -> tuple[list[str], int]:
    """A bank of so many prefixes, and the bytes of one's tensors."""
    bank = Bank(folder)
    config = method_class("prefix_tuning").Config.model_validate({"num_virtual_tokens": NUM_SLOTS})
    record = BaseRecord(name=base.name, fingerprint=base.fingerprint)
    card = Card(method="prefix_tuning", config=config.model_dump(mode="json"), positions="in_place", base=record)
    names = [f"user-{number:05d}" for number in range(count)]
    for number, name in enumerate(names):
        prefix = Prefix(tensors_of(base, number), card)
        bank.add(name, prefix)
        if number % 500 == 0:
            print(f"prefix {number} of {count}", flush=True)
    return names, prefix.num_bytes


def tensors_of(base: Base, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{part}": torch.randn(site.num_key_value_heads, NUM_SLOTS, width, generator=draw)
        for site in find_sites(base.model).attention
        for part, width in (("key", site.key_width), ("value", site.value_width))
    }


async def measured(
    address: str, process: int, names: list[str], weights: int, prefix_bytes: int, options: Any
) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=64)) as client:
        memory = await memory_of(client, process, names[: options.resident], weights, prefix_bytes)
        ratios, rates = await rates_of(client, names, options)
        first = await first_tokens(client, names, options.rounds)
    return {"ratios": ratios, "tokens_per_s": rates, "first_token_ms": first, "memory": memory}


async def rates_of(
    client: httpx.AsyncClient, names: list[str], options: Any
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    arms = {
        "16 clients, 16 prefixes": names[:CLIENTS],
        "16 clients, one prefix": names[:1] * CLIENTS,
        "one client": names[:1],
    }
    for clients in arms.values():  # every prefix in memory, every kernel chosen
        await tokens_per_s(client, clients, 4)
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(options.rounds):
        for arm in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            rates[arm].append(await tokens_per_s(client, arms[arm], options.tokens))
            print(f"round {number + 1} of {options.rounds}: {arm}, {rates[arm][-1]:.1f} tokens/s", flush=True)
    mixed, one, single = rates.values()
    return {
        "16 prefixes / one prefix, 16 clients": spread([a / b for a, b in zip(mixed, one, strict=True)]),
        "16 clients / one client, one prefix": spread([a / b for a, b in zip(one, single, strict=True)]),
        "16 clients on 16 prefixes / one client": spread([a / b for a, b in zip(mixed, single, strict=True)]),
    }, rates


async def tokens_per_s(client: httpx.AsyncClient, names: list[str], tokens: int) -> float:
    """Of clients that all begin at once and write as much as the others."""
    began = time.perf_counter()
    await asyncio.gather(*(first_token_of(client, name, tokens) for name in names))
    return len(names) * tokens / (time.perf_counter() - began)


async def first_token_of(client: httpx.AsyncClient, name: str, tokens: int) -> float:
    """Seconds to the first token of a text that is written to its end."""
    began, first = time.perf_counter(), None
    asked = {"model": f"{BASE}:{name}", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as reply:
        lines: AsyncIterator[str] = reply.aiter_lines()
        async for line in lines:
            assert "error" not in line, line
            if first is None and line.startswith("data: {"):
                first = time.perf_counter() - began
    assert first is not None, reply.status_code
    return first


async def first_tokens(client: httpx.AsyncClient, names: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds: idle server, and beside eight clients that write; a prefix in memory, and one that is not."""
    found = {}
    cold_names = iter(names[::-1])
    for beside in (0, 8):
        stop = asyncio.Event()
        background = [asyncio.create_task(keep_busy(client, name, stop)) for name in names[:beside]]
        warm, cold = [], []
        for _ in range(4 * rounds):
            warm.append(1000 * await first_token_of(client, names[9], 1))
            cold.append(1000 * await first_token_of(client, next(cold_names), 1))
        stop.set()
        await asyncio.gather(*background)
        more = [c - w for c, w in zip(cold, warm, strict=True)]
        where = f"beside {beside} clients"
        found[where] = {"resident": spread(warm), "not resident": spread(cold), "more": spread(more)}
    return found


async def keep_busy(client: httpx.AsyncClient, name: str, stop: asyncio.Event) -> None:
    while not stop.is_set():
        await first_token_of(client, name, 64)


async def memory_of(
    client: httpx.AsyncClient, process: int, names: list[str], weights: int, prefix_bytes: int
) -> dict[str, Any]:
    """In MiB, of the server's processes."""
    await first_token_of(client, names[0], 16)  # what the first job makes stays
    await told(client, "unload", names[0])
    before = own_bytes(process)
    for name in names:
        await told(client, "load", name)
    after, tensors = own_bytes(process), prefix_bytes * len(names)
    for name in names:
        await told(client, "unload", name)
    mib = 1 << 20
    return {
        "prefixes": len(names), "without_mib": before / mib, "with_mib": after / mib, "tensors_mib": tensors / mib,
        "weights_mib": weights / mib, "with / (weights + tensors)": after / (weights + tensors),
        "with / (without + tensors)": after / (before + tensors),
    }  # fmt: skip


async def told(client: httpx.AsyncClient, what: str, name: str) -> None:
    reply = await client.post(f"/v1/{what}_prefix", json={"prefix_name": name})
    reply.raise_for_status()


def spread(values: list[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


if __name__ == "__main__":
    main()
