"""The HTTP side over a scripted engine: replies, streams, refusals, keys, limits, what engines do rarely."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import tiny_model
from pydantic import TypeAdapter
from scripted_engine import ScriptedEngine, ids_of, serving_over, writes
from test_prefix_file import tiny_prefix

from antefix.bank import Bank
from antefix.errors import ServerError
from antefix.server import replies, wire
from antefix.server.app import make_app
from antefix.server.keys import Key, Keys
from antefix.server.messages import Event, Failed, Finished, Job, Token
from antefix.server.serving import Serving
from antefix.server.tokens import Tokens
from antefix.server.wire import IGNORED

BASE = "tiny/llama"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder, model = tmp_path_factory.mktemp("served") / "bank", tiny_model("llama")
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

# ---- replies


def test_a_completion(bank: Bank) -> None:
    client, engine = caller(bank, writes("one €", num_slots=0))
    reply = client.post("/v1/completions", COMPLETION).json()
    TypeAdapter(replies.Completion).validate_python(reply, extra="forbid")
    assert reply["choices"] == [{"index": 0, "text": "one €", "logprobs": None, "finish_reason": "stop"}]
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 7,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0, "prefix_tokens": 0},
    }
    (job,) = engine.jobs
    assert (job.prompt, job.prefixes) == (tuple(ids_of("hi")), ())
    assert (job.sampling.max_tokens, job.sampling.temperature, job.sampling.top_p) == (10, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("hi", ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        (ids_of("hi"), ["hi"]),
        ([ids_of("hi"), ids_of("€")], ["hi", "€"]),
    ],
)
def test_prompts_of_all_forms_and_n(bank: Bank, prompt: Any, read: list[str]) -> None:
    client, engine = caller(bank)
    reply = client.post("/v1/completions", {**COMPLETION, "prompt": prompt, "n": 2, "seed": 5}).json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(read)))
    assert [job.prompt for job in engine.jobs] == [tuple(ids_of(text)) for text in read for _ in range(2)]
    assert [job.sampling.seed for job in engine.jobs] == [5, 6] * len(read)
    assert reply["usage"]["prompt_tokens"] == sum(len(ids_of(text)) for text in read)


def test_scores_of_a_completion(bank: Bank) -> None:
    client, _ = caller(bank, writes("a€"))
    reply = client.post("/v1/completions", {**COMPLETION, "logprobs": 1, "echo": True}).json()
    (choice,) = reply["choices"]
    assert choice["text"] == "hia€"
    found = choice["logprobs"]
    assert found["tokens"] == ["h", "i", "a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert found["token_logprobs"] == [None, -1.0, 0.0, -1.0, -2.0, -3.0]
    assert found["top_logprobs"][:3] == [None, {"i": -0.5}, {"a": -0.5}]
    assert found["text_offset"] == [0, 1, 2, 3, 3, 3]


def test_an_echo_alone_scores_the_prompt(bank: Bank) -> None:
    client, engine = caller(bank)
    asked = {**COMPLETION, "logprobs": 0, "echo": True, "max_tokens": 0}
    (choice,) = client.post("/v1/completions", asked).json()["choices"]
    assert (choice["text"], choice["logprobs"]["token_logprobs"]) == ("hi", [None, -1.0])
    assert engine.jobs[0].sampling.prompt_logprobs
    (choice,) = client.post("/v1/completions", {**COMPLETION, "echo": True}).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("hiab", None)
    assert not engine.jobs[1].sampling.prompt_logprobs


def test_slots_are_counted_once_for_every_prompt_as_its_tokens_are(bank: Bank) -> None:
    client, _ = caller(bank, writes("ab", num_slots=3))
    usage = client.post("/v1/completions", {**COMPLETION, "model": "menus", "prompt": ["a", "b"], "n": 2}).json()[
        "usage"
    ]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["prefix_tokens"]) == (2, 6)


def test_stop_strings_span_tokens_and_end_the_job(bank: Bank) -> None:
    client, engine = caller(bank, writes("one. Two. Three", num_slots=9))
    asked = {**COMPLETION, "model": "menus", "stop": [". Th", "Two"], "logprobs": 0, "max_tokens": 99}
    reply = client.post("/v1/completions", asked).json()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one. ", "stop")
    assert choice["logprobs"]["tokens"] == list("one. "), "scores end where the text does"
    assert reply["usage"]["completion_tokens"] == len("one. Two")
    assert reply["usage"]["prompt_tokens_details"]["prefix_tokens"] == 3, "the card says it where the engine did not"
    assert engine.cancelled == [engine.jobs[0].id]
    asked |= {"ignore_eos": True}
    assert client.post("/v1/completions", asked).json()["choices"][0]["text"] == "one. Two. Three"


def test_a_chat(bank: Bank) -> None:
    client, engine = caller(bank, writes("yé", "length"))
    asked = {**CHAT, "logprobs": True, "top_logprobs": 1}
    reply = client.post("/v1/chat/completions", asked).json()
    TypeAdapter(replies.ChatCompletion).validate_python(reply, extra="forbid")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "yé", "refusal": None}
    assert choice["finish_reason"] == "length"
    first, second, third = choice["logprobs"]["content"]
    assert first == {
        "token": "y",
        "logprob": 0.0,
        "bytes": [121],
        "top_logprobs": [{"token": "y", "logprob": -0.5, "bytes": [121]}],
    }
    assert bytes(second["bytes"] + third["bytes"]).decode() == "é"
    assert engine.jobs[0].prompt == tuple(ids_of("user: hi\nassistant: "))


def test_contents_in_parts_developers_and_a_turn_to_be_gone_on_with(bank: Bank) -> None:
    client, engine = caller(bank)
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "I say"},
    ]
    assert client.post("/v1/chat/completions", {**CHAT, "messages": messages}).status_code == 200
    assert engine.jobs[0].prompt == tuple(ids_of("system: be kind\nuser: ab\nassistant: I say"))


def test_a_prefix_is_given_what_it_was_trained_on(bank: Bank) -> None:
    client, engine = caller(bank)
    ask = "/v1/chat/completions"
    assert client.post(ask, {**CHAT, "model": "talk"}).status_code == 200
    assert engine.jobs[-1].prompt == tuple(ids_of("user: Be short. hi\nassistant: "))
    source = [{"role": "user", "content": "name[Fern Hill]"}]
    assert client.post(ask, {"model": f"{BASE}:menus", "messages": source}).status_code == 200
    assert engine.jobs[-1].prompt == tuple(ids_of("name: Fern Hill\n"))
    assert (engine.jobs[-1].sampling.max_tokens, engine.jobs[-1].sampling.temperature) == (7, 0.0)
    two = [{"role": "system", "content": "x"}, *source]
    assert (
        "was not trained on conversations"
        in error(client.post(ask, {**CHAT, "model": "menus", "messages": two}), 400)["message"]
    )


@pytest.mark.parametrize(
    ("model", "table", "read"),
    [
        ("menus", {"name": "Fern Hill", "stars": 3, "near": None}, "name: Fern Hill | stars: 3\n"),
        ("menus", [["name", "A"], ["name", "B"]], "name: A | name: B\n"),
        ("menus", "name: A | food: B", "name: A | food: B\n"),
        ("news", [["a", "r", "b"]], "a : r : b\n"),
        ("talk", "hello", "user: Be short. hello\nassistant: "),
        (BASE, {"name": "A"}, "name: A\n"),
        (BASE, [["a", "r", "b"]], "a : r : b\n"),
        (BASE, "plain", "plain\n"),
    ],
)
def test_tables_in_the_text_format_of_a_prefix(bank: Bank, model: str, table: Any, read: str) -> None:
    client, engine = caller(bank)
    reply = client.post("/v1/tables", {"model": model, "table": table})
    assert reply.json()["choices"][0]["text"] == "ab"
    assert engine.jobs[0].prompt == tuple(ids_of(read))


def test_the_spaces_of_a_text_format_are_no_part_of_a_text(bank: Bank) -> None:
    client, _ = caller(bank, writes("  a b. "))
    asked = {"model": "menus", "table": {"name": "A"}, "max_tokens": 20}
    assert client.post("/v1/tables", asked).json()["choices"][0]["text"] == "a b."
    found = events(client.post("/v1/tables", {**asked, "stream": True}))[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in found) == "a b."
    chat = {"model": "menus", "messages": [{"role": "user", "content": "name: A"}], "max_tokens": 20, "logprobs": True}
    (choice,) = client.post("/v1/chat/completions", chat).json()["choices"]
    assert choice["message"]["content"] == "a b."
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == "  a b. ", "tokens are all scored"


def test_a_card_decides_unless_the_request_does(bank: Bank) -> None:
    client, engine = caller(bank)
    reply = client.post("/v1/completions", {**COMPLETION, "model": "drawn"})
    assert reply.headers["x-antefix-not-applied"] == "num_beams, top_k"
    client.post("/v1/completions", {**COMPLETION, "model": "drawn", "temperature": 2, "top_p": 0})
    client.post("/v1/completions", {**COMPLETION, "model": "menus", "temperature": 1, "top_p": 0.3})
    found = [(job.sampling.temperature, job.sampling.top_p) for job in engine.jobs]
    assert found == [(0.5, 0.9), (0.0, 1.0), (1.0, 0.3)]


def test_several_prefixes_on_one_request(bank: Bank) -> None:
    client, engine = caller(bank, writes("a", num_slots=6))
    asked = {**COMPLETION, "antefix": {"prefixes": ["talk", f"{BASE}:menus"]}}
    reply = client.post("/v1/completions", asked).json()
    assert engine.jobs[0].prefixes == ("talk", "menus")
    assert reply["usage"]["prompt_tokens_details"]["prefix_tokens"] == 6
    assert "goes with model" in error(client.post("/v1/completions", {**asked, "model": "menus"}), 400)["message"]
    twice = {**COMPLETION, "antefix": {"prefixes": ["talk", "talk"]}}
    assert "each once" in error(client.post("/v1/completions", twice), 400)["message"]


# ---- streams


def test_a_stream_of_a_chat(bank: Bank) -> None:
    client, _ = caller(bank, writes("a€"))
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/chat/completions", asked))
    assert found.pop() == "[DONE]"
    for chunk in found:
        TypeAdapter(replies.ChatChunk).validate_python(chunk, extra="forbid")
    usage = found.pop()
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in found]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None), ({"content": "a"}, None), ({"content": "€"}, None), ({}, "stop"),
    ]  # fmt: skip
    assert all(chunk["usage"] is None for chunk in found)
    assert len({chunk["id"] for chunk in found}) == 1


def test_a_stream_of_completions_is_the_reply_in_pieces(bank: Bank) -> None:
    client, _ = caller(bank, writes("one. Two"))
    asked = {**COMPLETION, "prompt": ["hi", "you"], "n": 2, "logprobs": 1, "echo": True, "stop": "Tw", "seed": 1}
    whole = client.post("/v1/completions", asked).json()
    found = events(client.post("/v1/completions", {**asked, "stream": True}))
    assert found.pop() == "[DONE]"
    for choice in whole["choices"]:
        chunks = [c["choices"][0] for c in found if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_stream_without_a_word_says_so(bank: Bank) -> None:
    def slow(job: Job) -> Iterable[Event | float]:
        yield 0.25
        yield from writes("a")(job)

    client, _ = caller(bank, slow, ping_s=0.1)
    found = events(client.post("/v1/chat/completions", {**CHAT, "stream": True}))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[1:3] == [": ping", ": ping"]
    assert found[-1] == "[DONE]"


def test_what_fails_before_the_first_token_has_its_status_also_in_a_stream(bank: Bank) -> None:
    kinds = {
        "not_found": 404, "broken_prefix": 400, "unsupported": 400, "too_long": 400, "overloaded": 429,
        "unavailable": 503, "internal": 500,
    }  # fmt: skip
    for kind, status in kinds.items():
        client, _ = caller(bank, lambda job, kind=kind: [Failed(job.id, "the reason", kind)])
        for stream in (False, True):
            reply = client.post("/v1/completions", {**COMPLETION, "stream": stream})
            assert error(reply, status)["message"] == "the reason"
            assert ("retry-after" in reply.headers) == (status in (429, 503))


def test_what_fails_later_is_an_event_and_no_done(bank: Bank) -> None:
    def fails(job: Job) -> Iterable[Event]:
        yield Token(job.id, ids_of("a")[0], None, ())
        yield Failed(job.id, "the worker died", "unavailable")

    client, _ = caller(bank, fails)
    found = events(client.post("/v1/completions", {**COMPLETION, "stream": True}))
    assert found[-1]["error"]["message"] == "the worker died"
    assert "[DONE]" not in found
    assert error(client.post("/v1/completions", COMPLETION), 503)["code"] == "unavailable"


def test_one_choice_that_fails_ends_the_others(bank: Bank) -> None:
    def one_fails(job: Job) -> Iterable[Event | float]:
        if job.id.endswith("-1"):
            yield Failed(job.id, "no room", "overloaded")
        yield Token(job.id, ids_of("a")[0], None, ())
        yield 30.0

    client, engine = caller(bank, one_fails)
    found = error(client.post("/v1/completions", {**COMPLETION, "n": 3}), 429)
    assert (found["message"], found["code"]) == ("no room", "overloaded"), "of the engine, not of the queue before it"
    assert sorted(engine.cancelled) == sorted(job.id for job in engine.jobs if not job.id.endswith("-1"))
    assert client.serving.admission.open == 0


def test_a_stream_that_echoes_is_refused_as_any_other(bank: Bank) -> None:
    def refuses(job: Job) -> Iterable[Event]:
        yield Failed(job.id, "too long", "too_long")

    client, _ = caller(bank, refuses)
    error(client.post("/v1/completions", {**COMPLETION, "stream": True, "echo": True}), 400)


@pytest.mark.parametrize("log_texts", [False, True])
def test_what_was_sent_is_in_the_log_only_if_asked_for(
    bank: Bank, caplog: pytest.LogCaptureFixture, log_texts: bool
) -> None:
    client, _ = caller(bank, log_texts=log_texts)
    for path, wrong in (
        ("/v1/tables", {"model": "menus", "table": "my SECRET words"}),
        ("/v1/completions", {**COMPLETION, "model": "SECRET"}),
        ("/v1/chat/completions", {**CHAT, "temperature": "SECRET"}),
    ):
        caplog.clear()
        with caplog.at_level("INFO", "antefix.server"):
            assert client.post(path, wrong).status_code in (400, 404)
        (line,) = [record for record in caplog.records if record.name == "antefix.server"]
        assert vars(line)["told"]["failed"]["status"] in (400, 404)
        assert log_texts or "SECRET" not in str(vars(line))


def test_our_own_faults_are_in_the_log_and_not_told_to_clients(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    def breaks(job: Job) -> Iterable[Event]:
        raise ZeroDivisionError("a secret")

    client, _ = caller(bank, breaks)
    for stream in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "antefix.server"):
            reply = client.post("/v1/completions", {**COMPLETION, "stream": stream})
        assert error(reply, 500)["code"] == "internal_error"
        assert "secret" not in reply.text
        fault, line = [record for record in caplog.records if record.name == "antefix.server"]
        assert fault.exc_info is not None
        assert "a secret" in str(fault.exc_info[1])
        told: dict[str, Any] = vars(line)["told"]
        assert told["status"] == 500
        assert told["failed"] == {
            "status": 500, "code": "internal_error", "param": None, "message": error(reply, 500)["message"]
        }  # fmt: skip
        assert reply.headers["x-request-id"] == told["request"]
    assert 'antefix_requests_total{route="/v1/completions",status="500"} 2.0' in client.get("/metrics").text


# ---- what is refused


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


# ---- models


def test_the_models_with_their_parents(bank: Bank) -> None:
    client, engine = caller(bank)
    engine.loaded["menus"] = False
    found = client.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == [BASE, *(f"{BASE}:{name}" for name in sorted(bank))]
    assert [model["parent"] for model in found["data"]] == [None, *[BASE] * len(bank)]
    assert [model["antefix"]["resident"] for model in found["data"][1:]] == [False, True, False, False]
    one = client.get(f"/v1/models/{BASE}:menus").json()
    assert one["antefix"]["card"]["text_format"]["linearise"] == "table"
    assert client.get("/v1/models/menus").json() == one
    (listed,) = [m for m in client.get("/v1/models").json()["data"] if m["id"] == one["id"]]
    assert listed["antefix"].items() <= one["antefix"].items(), "the list says of a prefix what its own page says"
    assert client.get(f"/v1/models/{BASE}").json()["parent"] is None
    assert error(client.get(f"/v1/models/{BASE}:none"), 404)["code"] == "model_not_found"
    error(client.get("/v1/models/../../etc"), 404)


def test_the_list_in_pages_by_search_and_by_tag(bank: Bank) -> None:
    client, _ = caller(bank)

    def names(query: str) -> list[str]:
        return [model["id"].removeprefix(f"{BASE}:") for model in client.get(f"/v1/models?{query}").json()["data"]]

    assert names("search=FOO") == ["menus"]
    assert names("tag=food") == ["menus"]
    first = client.get("/v1/models?limit=2").json()
    assert (names("limit=2"), first["has_more"]) == ([BASE, "drawn"], True)
    last = client.get(f"/v1/models?limit=3&after={first['data'][-1]['id']}").json()
    assert ([m["root"] for m in last["data"]], last["has_more"]) == (["menus", "news", "talk"], False)


def test_a_new_prefix_is_there_at_once_and_a_removed_one_gone(bank: Bank, tmp_path: Path) -> None:
    own = Bank(tmp_path / "bank")
    own.add("first", bank["menus"])
    client, _ = caller(own)
    assert len(client.get("/v1/models").json()["data"]) == 2
    own.add("second", bank["menus"])
    assert [m["root"] for m in client.get("/v1/models").json()["data"][1:]] == ["first", "second"]
    assert client.post("/v1/completions", {**COMPLETION, "model": "second"}).status_code == 200
    own.remove("second")
    assert len(client.get("/v1/models").json()["data"]) == 2
    error(client.post("/v1/completions", {**COMPLETION, "model": "second"}), 404)
    (own.folder / "first" / "card.json").write_text("{")
    assert error(client.post("/v1/completions", {**COMPLETION, "model": "first"}), 400)["code"] == "broken_prefix"


def test_prefixes_are_loaded_and_unloaded_as_vllm_does_loras(bank: Bank) -> None:
    client, engine = caller(bank)
    reply = client.post("/v1/load_prefix", {"prefix_name": "dishes", "prefix_path": "menus"})
    assert (reply.status_code, reply.text) == (200, "Success: prefix 'dishes' added successfully.")
    assert client.post("/v1/completions", {**COMPLETION, "model": "dishes"}).status_code == 200
    assert engine.jobs[-1].prefixes == ("menus",)
    taken = {"prefix_name": "dishes", "prefix_path": "talk"}
    assert "is taken" in error(client.post("/v1/load_prefix", taken), 400)["message"]
    assert client.post("/v1/load_prefix", {"prefix_name": "talk", "pin": True}).status_code == 200
    assert engine.loaded == {"menus": False, "talk": True}
    assert client.post("/v1/unload_prefix", {"prefix_name": "dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)
    error(client.post("/v1/unload_prefix", {"prefix_name": "dishes"}), 404)
    assert error(client.post("/v1/load_prefix", {"prefix_name": "news"}), 400)["code"] == "broken_prefix"
    for path in ("../menus", "/etc", "menus/../menus", str(bank.folder.parent)):
        error(client.post("/v1/load_prefix", {"prefix_name": "x", "prefix_path": path}), 400)
    absolute = {"prefix_name": "talk", "prefix_path": str(bank.folder.absolute() / "talk")}
    assert client.post("/v1/load_prefix", absolute).status_code == 200


def test_a_prefix_of_the_bank_goes_by_its_own_name(bank: Bank, tmp_path: Path) -> None:
    own = Bank(tmp_path / "own")
    own.add("first", bank["menus"])
    client, engine = caller(own)
    assert client.post("/v1/load_prefix", {"prefix_name": "second", "prefix_path": "first"}).status_code == 200
    own.add("second", bank["talk"])
    assert client.post("/v1/completions", {**COMPLETION, "model": "second"}).status_code == 200
    assert engine.jobs[-1].prefixes == ("second",)


def test_a_second_name_can_be_given_back_when_its_prefix_has_left_the_memory(bank: Bank) -> None:
    client, engine = caller(bank)
    assert client.post("/v1/load_prefix", {"prefix_name": "dishes", "prefix_path": "menus"}).status_code == 200
    engine.loaded.clear()
    assert client.post("/v1/unload_prefix", {"prefix_name": "dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)


def test_a_second_name_is_the_same_with_the_bases_before_it(bank: Bank) -> None:
    client, engine = caller(bank)
    named = {"prefix_name": f"{BASE}:dishes", "prefix_path": "menus"}
    assert client.post("/v1/load_prefix", named).status_code == 200
    for model in ("dishes", f"{BASE}:dishes"):
        assert client.post("/v1/completions", {**COMPLETION, "model": model}).status_code == 200
    taken = {"prefix_name": f"{BASE}:dishes", "prefix_path": "talk", "pin": True}
    assert "is taken" in error(client.post("/v1/load_prefix", taken), 400)["message"]
    assert engine.loaded == {"menus": False}, "what is refused is not read"
    assert client.post("/v1/load_prefix", {"prefix_name": f"{BASE}:menus"}).status_code == 200
    assert client.post("/v1/unload_prefix", {"prefix_name": f"{BASE}:dishes"}).status_code == 200
    error(client.post("/v1/completions", {**COMPLETION, "model": "dishes"}), 404)


# ---- keys


def keys_file(folder: Path) -> Path:
    def digest(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()

    path = folder / "keys.toml"
    path.write_text(
        f'[[key]]\nname = "all"\nsha256 = "{digest("secret-a")}"\nmanage = true\n'
        f'[[key]]\nname = "kitchen"\nsha256 = "{digest("secret-b")}"\nprefixes = ["menus"]\n'
    )
    return path


def test_a_key_opens_what_it_says(bank: Bank, tmp_path: Path) -> None:
    keys = Keys.read(keys_file(tmp_path))
    for key, code in ((None, "missing_api_key"), ("wrong", "invalid_api_key")):
        client, _ = caller(bank, keys=keys, key=key)
        for reply in (client.post("/v1/completions", COMPLETION), client.get("/v1/models"), client.get("/metrics")):
            assert error(reply, 401)["code"] == code
        assert client.get("/health").status_code == 200
    client, _ = caller(bank, keys=keys, key="secret-a")
    assert client.post("/v1/completions", COMPLETION).status_code == 200
    assert client.get("/metrics").status_code == 200
    client, engine = caller(bank, keys=keys, key="secret-b")
    assert client.post("/v1/completions", {**COMPLETION, "model": "menus"}).status_code == 200
    assert [model["root"] for model in client.get("/v1/models").json()["data"]] == ["menus"]
    several = {**COMPLETION, "antefix": {"prefixes": ["menus", "talk"]}}
    more = {"antefix": several["antefix"]}
    table = {"table": "name[Fern]"}
    for path, asked in (
        ("/v1/completions", COMPLETION), ("/v1/completions", {**COMPLETION, "model": "talk"}),
        ("/v1/completions", several), ("/v1/chat/completions", CHAT), ("/v1/chat/completions", {**CHAT, **more}),
        ("/v1/tables", {**table, "model": "talk"}), ("/v1/tables", {**table, "model": BASE, **more}),
    ):  # fmt: skip
        assert error(client.post(path, asked), 403)["code"] == "model_not_allowed"
    error(client.get("/v1/models/talk"), 403)
    there, nowhere = (client.post("/v1/completions", {**COMPLETION, "model": m}) for m in ("talk", "nobody"))
    assert error(there, 403) == error(nowhere, 403), "a key learns nothing of what it does not open"
    assert error(client.get("/v1/models/nobody"), 403)["code"] == "model_not_allowed"
    limited = Key(name="m", sha256=hashlib.sha256(b"k").hexdigest(), prefixes=("menus",), manage=True)
    managing, _ = caller(bank, keys=Keys([limited]), key="k")
    there, nowhere = (managing.post("/v1/load_prefix", {"prefix_name": name}) for name in ("talk", "nobody"))
    assert error(there, 403) == error(nowhere, 403)
    error(client.post("/v1/load_prefix", {"prefix_name": "menus"}), 403)
    error(client.get("/metrics"), 403)
    assert len(engine.jobs) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "key: Field required"),
        ("key = []", "no [[key]]"),
        ('[[key]]\nname = "a"\nsha256 = "short"', "sha256"),
        ('[[key]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nadmin = true', "admin"),
        (2 * ('[[key]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\n'), "same name"),
        ("key = [", "keys.toml"),
    ],
)
def test_a_wrong_file_of_keys(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ServerError, match="API keys: ") as caught:
        Keys.read(path)
    assert message in str(caught.value)
    with pytest.raises(ServerError, match="No such file"):
        Keys.read(tmp_path / "none.toml")


# ---- limits, health, metrics


def test_a_request_that_is_too_long(bank: Bank) -> None:
    client, engine = caller(bank, max_body_bytes=200)
    error(client.post("/v1/completions", {**COMPLETION, "prompt": "x" * 300}), 413)

    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 50

    json_type = {"Content-Type": "application/json"}
    assert (
        error(client.post("/v1/completions", content=chunks(), headers=json_type), 413)["code"] == "request_too_large"
    )
    body = json.dumps(COMPLETION).encode()
    exact = body + b" " * (200 - len(body))
    assert client.post("/v1/completions", content=exact, headers=json_type).status_code == 200
    error(client.post("/v1/completions", content=exact + b" ", headers=json_type), 413)
    assert len(engine.jobs) == 1


def test_a_full_queue_is_a_429_and_room_is_given_back(bank: Bank) -> None:
    client, _ = caller(bank, max_waiting=2)  # and two rows
    assert (
        "the most this server takes is 4"
        in error(client.post("/v1/completions", {**COMPLETION, "n": 5}), 400)["message"]
    )
    with client.serving.admission.enter(1):
        reply = client.post("/v1/completions", {**COMPLETION, "n": 4})
        assert error(reply, 429)["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
        assert client.post("/v1/completions", {**COMPLETION, "n": 3}).status_code == 200
    for stream in (False, True):
        assert client.post("/v1/completions", {**COMPLETION, "n": 4, "stream": stream}).status_code == 200
    client.serving.admission.stopping = True
    reply = client.post("/v1/completions", COMPLETION)
    assert error(reply, 503)["code"] == "stopping"
    assert "retry-after" in reply.headers


def test_a_client_that_reads_no_more_gives_its_room_back(bank: Bank) -> None:
    client, _ = caller(bank, writes("a" * 50), unread_s=0.2)
    content = json.dumps({**COMPLETION, "max_tokens": 50, "stream": True}).encode()
    requests: list[dict[str, Any]] = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return requests.pop(0) if requests else await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            assert client.serving.admission.open == 1
            await asyncio.Future()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 10))
    assert client.serving.admission.open == 0
    assert len(sent) == 3
    assert sent[-1]["more_body"]
    assert "antefix_clients_gone_total 1.0" in client.get("/metrics").text


def test_health_is_the_engines_not_the_ports(bank: Bank) -> None:
    client, engine = caller(bank)
    assert client.get("/health").json()["status"] == "ok"
    for state in ("restarting", "stopping", "dead"):
        engine.state = state  # type: ignore[assignment]
        reply = client.get("/health")
        assert (reply.status_code, reply.json()["engine"]) == (503, state)


def test_metrics(bank: Bank) -> None:
    client, _ = caller(bank, writes("abc"))
    client.post("/v1/completions", {**COMPLETION, "model": "menus"})
    client.post("/v1/completions", {**COMPLETION, "model": "none"})
    page = client.get("/metrics").text
    for line in (
        'antefix_requests_total{route="/v1/completions",status="200"} 1.0',
        'antefix_requests_total{route="/v1/completions",status="404"} 1.0',
        'antefix_written_tokens_total{prefix="menus"} 3.0',
        'antefix_prompt_tokens_total{prefix="menus"} 2.0',
        'antefix_time_to_first_token_seconds_count{prefix="menus"} 1.0',
        "antefix_queue 3.0",
        "antefix_batch_fill 0.5",
        "antefix_tokens_per_second 12.5",
        "antefix_worker_restarts 1.0",
    ):
        assert line in page


def test_the_first_token_is_timed_from_the_request_on(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def slowly(tokens: Tokens, text: str) -> tuple[int, ...]:
        await asyncio.sleep(0.1)
        return tuple(ids_of(text))

    monkeypatch.setattr(Tokens, "of_text", slowly)
    client, _ = caller(bank)
    with caplog.at_level("INFO", "antefix.server"):
        client.post("/v1/completions", COMPLETION)
    (told,) = [record.told for record in caplog.records if hasattr(record, "told")]
    assert 100 <= told["first_token_ms"] <= told["ms"]


def test_labels_of_prefixes_are_bounded(bank: Bank) -> None:
    meters = caller(bank)[0].serving.meters
    labels = {meters.label((f"p{n}",)) for n in range(500)}
    assert len(labels) == 101
    assert meters.label(("p3",)) == "p3"
    assert meters.label(("p400",)) == "(others)"


def test_the_log_has_no_texts_unless_asked(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    for log_texts in (False, True):
        client, _ = caller(bank, writes("written words"), log_texts=log_texts)
        caplog.clear()
        with caplog.at_level("INFO", "antefix.server"):
            client.post("/v1/completions", {**COMPLETION, "prompt": "private words", "max_tokens": 99})
        (told,) = [record.told for record in caplog.records if hasattr(record, "told")]
        assert told["model"] == BASE
        assert (told["status"], told["prompt_tokens"], told["written_tokens"]) == (200, 13, 13)
        assert told["first_token_ms"] >= 0
        assert ("private words" in str(told)) == log_texts
        assert ("written words" in str(told)) == log_texts


def test_a_cancelled_job_is_told_as_such(bank: Bank) -> None:
    client, _ = caller(bank, lambda job: [Finished(job.id, "cancelled")])
    assert error(client.post("/v1/completions", COMPLETION), 503)["message"] == "the text was cancelled"
