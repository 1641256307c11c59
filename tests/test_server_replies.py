"""Replies and streams of the HTTP side, over a scripted engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from app_caller import BASE, CHAT, COMPLETION, caller, error, events, make_bank
from pydantic import TypeAdapter
from scripted_engine import ids_of, writes

from antefix.bank import Bank
from antefix.server import replies
from antefix.server.messages import Event, Failed, Job, Token


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("served") / "bank")


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
