"""What the HTTP side refuses, and what it takes no notice of."""

from __future__ import annotations

from typing import Any

import pytest
from app_caller import BASE, COMPLETION, caller, error, make_bank

from antefix.bank import Bank
from antefix.server import wire
from antefix.server.wire import IGNORED


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("served") / "bank")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"263": 1}}, "logit_bias", "0 to 262"),
        ({"prompt": [3, 263]}, "prompt", "0 to 262"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": "a\0b"}, None, "NUL"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"antefix": {"prefixes": []}}, "antefix", "at least 1"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"model": "other"}, "model", "there is no model 'other'"),
    ],
)
def test_a_wrong_request_is_told_why(bank: Bank, change: dict[str, Any], param: str | None, message: str) -> None:
    client, engine = caller(bank)
    found = error(client.post("/v1/completions", {**COMPLETION, **change}), 404 if "model" in change else 400)
    assert message in found["message"]
    assert found["param"] == param
    assert engine.jobs == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b"1" * 6000,
        b'{"model": "tiny/llama", "prompt": "\\ud800"}',
        b"[]",
        b"null",
    ],
)
def test_what_is_no_request_is_a_400(bank: Bank, body: bytes) -> None:
    client, _ = caller(bank)
    reply = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error(reply, 400)


def test_half_a_surrogate_pair_anywhere_is_a_400(bank: Bank) -> None:
    client, _ = caller(bank)
    for body in (
        '{"model": "tiny/llama", "prompt": "a", "stop": ["\\udfff"]}',
        '{"model": "tiny/llama", "prompt": "a", "\\ud800": 1}',
        '{"model": "\\ud800", "prompt": "a"}',
    ):
        reply = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert "surrogate" in error(reply, 400)["message"]
    reply = client.post("/v1/tables", content='{"model": "menus", "table": {"\\ud800": "x"}}')
    error(reply, 400)


def test_every_text_is_looked_through_once_however_deep_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(wire, "_NO_TEXT", type("Seen", (), {"search": lambda self, text: seen.append(text)})())
    turn = {"role": "user", "content": [{"type": "text", "text": "deep"}]}
    wire.ChatRequest.model_validate({"model": BASE, "messages": [turn]})
    assert seen.count("deep") == 1


def test_what_cannot_change_the_answer_is_ignored_and_null_is_not_said(bank: Bank) -> None:
    client, engine = caller(bank)
    harmless = dict.fromkeys(IGNORED, "x") | {"tools": [], "response_format": {"type": "text"}, "suffix": None}
    asked = {**COMPLETION, **harmless, "stop": None, "temperature": None, "logit_bias": None, "anything": None}
    assert client.post("/v1/completions", asked).status_code == 200
    assert len(engine.jobs) == 1


def test_wrong_methods_and_paths(bank: Bank) -> None:
    client, _ = caller(bank)
    assert error(client.get("/v1/completions"), 405)["type"] == "invalid_request_error"
    error(client.get("/v1/none"), 404)
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in client.get("/page/page.js").headers["content-security-policy"]


def test_the_schema_promises_no_422(bank: Bank) -> None:
    content = caller(bank)[0].get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/tables", "/v1/models", "/health"} <= set(content["paths"])
    for path in content["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
