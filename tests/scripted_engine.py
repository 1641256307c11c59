"""A second implementation of the engine's protocol: it writes what a script says, also what a real one does rarely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from conftest import CONTEXT, VOCABULARY, tiny_tokenizer

from antefix.bank import Bank
from antefix.errors import ServingError
from antefix.server.keys import Keys
from antefix.server.limits import Admission
from antefix.server.messages import Event, Failed, Finished, Job, PromptScored, Resident, Token
from antefix.server.models import Models
from antefix.server.serving import Rules, Serving
from antefix.server.settings import State, Status
from antefix.server.tokens import Tokens

Script = Callable[[Job], Iterable[Event | float]]
"""For a job its events; a number waits for so many seconds."""


def tokens() -> Tokens:
    return Tokens(tiny_tokenizer(), CONTEXT, VOCABULARY)


def ids_of(text: str) -> list[int]:
    found: list[int] = tiny_tokenizer()(text)["input_ids"]
    return found


def writes(text: str, reason: Any = "stop", num_slots: int = 0) -> Script:
    """Writes a text, a byte a token; scores everything with minus its place."""

    def script(job: Job) -> Iterable[Event]:
        if job.sampling.prompt_logprobs:
            places = range(len(job.prompt))
            scores = [None if n == 0 else -float(n) for n in places]
            yield PromptScored(job.id, tuple(scores), tuple(((i, -0.5),) for i in job.prompt))
        for place, token in enumerate(ids_of(text)[: job.sampling.max_tokens]):
            scored = job.sampling.logprobs is not None
            yield Token(job.id, token, -float(place) if scored else None, ((token, -0.5),) if scored else ())
        yield Finished(job.id, reason, num_slots)

    return script


class ScriptedEngine:
    """Remembers the jobs it was given, and those that were cancelled."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.loaded: dict[str, bool] = {}
        self.state: State = "running"

    async def stream(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        ended = False
        try:
            for event in self.script(job):
                if isinstance(event, float):
                    await asyncio.sleep(event)
                else:
                    await asyncio.sleep(0)
                    ended = isinstance(event, Finished | Failed)
                    yield event
        finally:
            if not ended:
                self.cancelled.append(job.id)

    async def load(self, name: str) -> None:
        if name == "news":
            raise ServingError("'news' was trained for another base", "broken_prefix")
        self.loaded[name] = False

    async def unload(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise ServingError(f"'{name}' is not in memory", "not_found")

    async def pin(self, name: str) -> None:
        self.loaded[name] = True

    def resident(self) -> tuple[Resident, ...]:
        return tuple(Resident(name, 100, pinned, 0) for name, pinned in self.loaded.items())

    def status(self) -> Status:
        return Status(self.state, self.alive, 3, 2, 4, 12.5, 100 * len(self.loaded), 1)

    @property
    def alive(self) -> bool:
        return self.state == "running"

    async def stop(self, grace_s: float) -> None:
        self.state = "dead"


def serving_over(
    engine: ScriptedEngine, bank: Bank, *, max_waiting: int = 256, keys: Keys | None = None, **rules: Any
) -> Serving:
    return Serving(
        engine=engine, tokens=tokens(), models=Models("tiny/llama", bank), admission=Admission(max_waiting, 2),
        rules=Rules(**rules), keys=keys,
    )  # fmt: skip
