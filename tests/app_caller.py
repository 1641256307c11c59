"""The HTTP side over a scripted engine, in this process: a bank, one who asks, and what its answers must look like."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from conftest import tiny_model
from pydantic import TypeAdapter
from scripted_engine import ScriptedEngine, serving_over, writes
from test_prefix_file import tiny_prefix

from antefix.bank import Bank
from antefix.server import replies
from antefix.server.app import make_app
from antefix.server.serving import Serving

BASE = "tiny/llama"


def make_bank(folder: Path) -> Bank:
    """Of four prefixes whose cards differ."""
    model = tiny_model("llama")
    cards: dict[str, Any] = {
        "menus": {
            "text_format": {"linearise": "table"},
            "decoding": {"max_new_tokens": 7},
            "tags": ("food",),
            "scores": {"dev": [{"step": 1, "dev_loss": 3.0}, {"step": 2, "dev_loss": 2.0}]},
        },
        "talk": {"text_format": {"chat": True, "instruction": "Be short. "}},
        "drawn": {"decoding": {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 5}},
        "news": {"text_format": {"linearise": "triples"}},
    }
    for name, card in cards.items():
        tiny_prefix(model, 3, **card).save(folder / name)
    return Bank(folder)


class Caller:
    """Speaks to an application in this process."""

    def __init__(self, serving: Serving, key: str | None = None) -> None:
        self.serving = serving
        self.app = make_app(serving)
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def send(self, method: str, path: str, asked: Any = None, **more: Any) -> Any:
        async def sent() -> Any:
            transport = httpx.ASGITransport(app=self.app)  # what the app raises is raised here
            async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=self.headers) as client:
                return await client.request(method, path, **({} if asked is None else {"json": asked}), **more)

        return asyncio.run(sent())

    def post(self, path: str, asked: Any = None, **more: Any) -> Any:
        return self.send("POST", path, asked, **more)

    def get(self, path: str) -> Any:
        return self.send("GET", path)


def caller(bank: Bank, script: Any = None, **more: Any) -> tuple[Caller, ScriptedEngine]:
    engine = ScriptedEngine(script or writes("ab"))
    key = more.pop("key", None)
    return Caller(serving_over(engine, bank, **more), key), engine


def events(reply: Any) -> list[Any]:
    """Of a stream: objects, comments and `[DONE]`."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == ""
    lines = [block.removeprefix("data: ") for block in blocks]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def error(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    content = TypeAdapter(replies.Error).validate_python(reply.json(), extra="forbid")
    return dict(content["error"])


COMPLETION = {"model": BASE, "prompt": "hi", "max_tokens": 10}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}
