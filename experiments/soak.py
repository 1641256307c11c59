"""A server under mixed load for a while: what it answers, and whether its memory stays flat.

    python experiments/soak.py --minutes 20 --out results/soak

Clients ask for texts with and without prefixes, whole and as streams; some vanish in the middle, some send what is no
request; prefixes are loaded, unloaded, added and removed, and broken ones are put into the bank. Every request is
answered, or told why not: any 5xx but 503 is a failure, and so is a request that nothing comes back from, a job that is
left at the end, a worker that was started again, and memory that grows. Writes `soak.json` (counts by kind and status,
memory of both processes) and `soak.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoConfig, AutoModelForCausalLM

import antefix
from antefix import embedded
from antefix.methods import method_class
from antefix.prefix import BaseRecord, Card, Prefix

from served import served  # isort: skip

MIB = 1 << 20
NONSENSE = "nonsense"
PROMISED = {503}
MOST_MIB_PER_HOUR = 60
"""Memory that grows faster is not flat."""
NO_REQUESTS = [b"{", b"[]", b'{"model": "p0"}', b'{"model": "p0", "prompt": "\\ud800"}', b"\x00" * 64, b"[" * 5000]


def random_prefix(base: antefix.Base, slots: int) -> Prefix:
    """Slots of random numbers, as a kept prefix of this base."""
    method = method_class("prefix_tuning")
    config = method.Config.model_validate({"num_virtual_tokens": slots, "initial": "normal"})
    module = method.build(base, config)
    card = Card(
        method="prefix_tuning", config=config.model_dump(mode="json"), positions=config.positions,
        base=BaseRecord(name=base.name, fingerprint=base.fingerprint), text_format={"linearise": "table"},
    )  # fmt: skip
    return Prefix(module.kept_tensors(), card)


class Soak:
    """The load, and what came of it."""

    def __init__(self, address: str, bank: Path, spare: Prefix, num_prefixes: int) -> None:
        self.client = httpx.AsyncClient(base_url=address, timeout=120)
        self.bank, self.spare, self.num_prefixes = bank, spare, num_prefixes
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.until = 0.0

    def model(self) -> str:
        return random.choice(["base", *(f"p{n}" for n in range(self.num_prefixes))])

    def note(self, kind: str, status: int | str, text: str = "") -> None:
        self.counts[kind, str(status)] += 1
        if isinstance(status, int) and status >= 500 and status not in PROMISED:
            self.failures.append(f"{kind}: {status} {text[:200]}")

    async def whole(self) -> None:
        asked: dict[str, Any] = {"model": self.model(), "prompt": "x" * random.randint(1, 200), "max_tokens": 12}
        asked |= random.choice(
            [{}, {"n": 3}, {"logprobs": 2, "echo": True}, {"temperature": 0}, {"stop": ["a", "the"]}]
        )
        reply = await self.client.post("/v1/completions", json=asked)
        self.note("whole", reply.status_code, reply.text)

    async def table(self) -> None:
        table = {"name": f"Place {random.random()}", "food": "French"}
        reply = await self.client.post("/v1/tables", json={"model": self.model(), "table": table, "max_tokens": 8})
        self.note("table", reply.status_code, reply.text)

    async def chat(self) -> None:
        asked = {"model": self.model(), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        reply = await self.client.post("/v1/chat/completions", json=asked)
        self.note("chat", reply.status_code, reply.text)

    async def several(self) -> None:
        names = [f"p{n}" for n in random.sample(range(self.num_prefixes), 2)]
        asked = {"model": "base", "antefix": {"prefixes": names}, "prompt": "Once", "max_tokens": 8}
        reply = await self.client.post("/v1/completions", json=asked)
        self.note("several prefixes", reply.status_code, reply.text)

    async def nonsense(self) -> None:
        """With a prefix whose numbers are too large for anything to come of them."""
        asked = {"model": NONSENSE, "prompt": "Once", "max_tokens": 8, "temperature": 0, "logprobs": 1}
        reply = await self.client.post("/v1/completions", json=asked)
        self.note("nonsense", reply.status_code, reply.text)

    async def stream(self) -> None:
        vanishes = random.random() < 0.4
        asked = {"model": self.model(), "prompt": "Once", "max_tokens": 40, "stream": True, "ignore_eos": vanishes}
        async with self.client.stream("POST", "/v1/completions", json=asked) as reply:
            last = ""
            async for line in reply.aiter_lines():
                last = line or last
                if vanishes and random.random() < 0.2:
                    self.note("vanished", reply.status_code)
                    return
        ended = last == "data: [DONE]" or "error" in last
        if reply.status_code == 200 and not ended:
            self.failures.append(f"stream: ended with {last[:200]!r}")
        self.note("stream", reply.status_code, last)

    async def broken(self) -> None:
        headers = {"Content-Type": "application/json"}
        reply = await self.client.post("/v1/completions", content=random.choice(NO_REQUESTS), headers=headers)
        self.note("no request", reply.status_code, reply.text)

    async def loads(self) -> None:
        path = random.choice(["/v1/load_prefix", "/v1/unload_prefix"])
        reply = await self.client.post(path, json={"prefix_name": f"p{random.randrange(self.num_prefixes)}"})
        self.note(path.rpartition("/")[2], reply.status_code, reply.text)

    async def files(self) -> None:
        """A prefix that comes, is broken, is asked for, and goes."""
        name = f"fleeting-{random.randrange(10**9)}"
        await asyncio.to_thread(self.spare.save, self.bank / name)
        asked = {"model": name, "prompt": "x", "max_tokens": 2}
        self.note("new prefix", (await self.client.post("/v1/completions", json=asked)).status_code)
        victim = self.bank / name / random.choice(["card.json", "prefix.safetensors"])
        victim.write_bytes(victim.read_bytes()[: random.randrange(100)])
        self.note("broken prefix", (await self.client.post("/v1/load_prefix", json={"prefix_name": name})).status_code)
        shutil.rmtree(self.bank / name)
        self.note("removed prefix", (await self.client.post("/v1/completions", json=asked)).status_code)

    async def one_client(self) -> None:
        often = {
            self.whole: 6, self.table: 3, self.chat: 3, self.stream: 6, self.several: 2, self.broken: 2,
            self.loads: 1, self.files: 1, self.nonsense: 1,
        }  # fmt: skip
        while time.monotonic() < self.until:
            (kind,) = random.choices(list(often), list(often.values()))
            try:
                await kind()
            except httpx.HTTPError as error:
                self.failures.append(f"{kind.__name__}: {type(error).__name__} {error}")

    async def run(self, minutes: float, num_clients: int, process: int) -> list[dict[str, float]]:
        """All clients for so long; memory, every few seconds."""
        start = time.monotonic()
        self.until = start + 60 * minutes
        clients = [asyncio.create_task(self.one_client()) for _ in range(num_clients)]
        samples = []
        while not all(client.done() for client in clients):
            samples.append({"seconds": time.monotonic() - start, **memory(process)})
            print(f"\r{samples[-1]['seconds']:6.0f} s  {sum(self.counts.values())} requests", end="", file=sys.stderr)
            await asyncio.wait(clients, timeout=2)
        await asyncio.gather(*clients)
        await self.client.aclose()
        print(file=sys.stderr)
        return samples


def health_at_rest(address: str) -> dict[str, Any]:
    """When the last who vanished are noticed, which takes a step of the batch; after a while, whatever there is."""
    end = time.monotonic() + 10
    while True:
        health: dict[str, Any] = httpx.get(f"{address}/health").json()
        if not health["running"] + health["waiting"] or time.monotonic() > end:
            return health
        time.sleep(0.2)


def memory(process: int) -> dict[str, float]:
    """Resident MiB of the server and of its engine's worker (the largest child)."""
    server = psutil.Process(process)
    children = [child.memory_info().rss for child in server.children(recursive=True)]
    return {"server_mib": server.memory_info().rss / MIB, "worker_mib": max(children, default=0) / MIB}


def slope_per_hour(samples: list[dict[str, float]], name: str) -> float:
    """MiB an hour over the second half, since the first fills caches: the median slope between two samples.

    A long prompt's scores take a hundred MiB for an instant, which a fit of least squares would follow.
    """
    later = samples[len(samples) // 2 :]
    slopes = [(b[name] - a[name]) / (b["seconds"] - a["seconds"]) for a, b in combinations(later, 2)]
    return 3600 * statistics.median(slopes)


def plot(samples: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, label in (("worker_mib", "the engine's worker"), ("server_mib", "the server")):
        axes.plot([s["seconds"] / 60 for s in samples], [s[name] for s in samples], label=label)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--prefixes", type=int, default=40)
    parser.add_argument("--base", default=embedded.NAME)
    parser.add_argument("--tiny", action="store_true", help="a random model of the base's form, of two layers")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    random.seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, named = Path(name), given.base
        base = antefix.load_base(given.base)
        if given.tiny:
            named = str(folder / "tiny")
            shrink(base, named)
            base = antefix.load_base(named)
        for n in range(given.prefixes):
            random_prefix(base, 4 + n % 12).save(folder / "bank" / f"p{n}")
        spare = random_prefix(base, 5)
        Prefix({n: t * 1e38 for n, t in spare.tensors.items()}, spare.card).save(folder / "bank" / NONSENSE)
        del base
        # Memory for fewer prefixes than there are, so that some always go.
        resident_mib = max(1, given.prefixes * spare.num_bytes // 2 // MIB)
        words = ["--base", named, "--name", "base", "--bank", str(folder / "bank")]
        words += ["--resident-mib", str(resident_mib), "--max-queue", "8", "--max-rows", "8"]
        with open(given.out / "server.log", "w") as log, served(words, log) as (process, address):
            soak = Soak(address, folder / "bank", spare, given.prefixes)
            samples = asyncio.run(soak.run(given.minutes, given.clients, process.pid))
            health = health_at_rest(address)
    found = {
        "minutes": given.minutes, "clients": given.clients, "prefixes": given.prefixes, "base": given.base,
        "tiny": given.tiny, "requests": sum(soak.counts.values()),
        "statuses": {f"{kind}: {status}": count for (kind, status), count in sorted(soak.counts.items())},
        "failures": soak.failures[:50], "num_failures": len(soak.failures), "health": health,
        "worker_mib_per_hour": slope_per_hour(samples, "worker_mib"),
        "server_mib_per_hour": slope_per_hour(samples, "server_mib"),
        "exit_code": process.returncode, "samples": samples,
    }  # fmt: skip
    (given.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(samples, given.out / "soak.png")
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=1))
    wrong = [f"{len(soak.failures)} failures"] if soak.failures else []
    wrong += [f"exit code {process.returncode}"] if process.returncode else []
    wrong += [f"{health[name]} {name} at the end" for name in ("running", "waiting", "restarts") if health[name]]
    for name in ("worker_mib_per_hour", "server_mib_per_hour"):
        wrong += [f"{name}: {found[name]:.0f}"] if found[name] > MOST_MIB_PER_HOUR else []
    sys.exit("; ".join(wrong) or 0)


def shrink(base: antefix.Base, folder: str) -> None:
    config = AutoConfig.for_model(**{**base.model.config.to_dict(), "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
