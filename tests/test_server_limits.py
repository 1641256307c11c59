"""Who may ask the HTTP side, how much at once, and what it tells of itself: keys, limits, health, metrics, logs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from app_caller import BASE, CHAT, COMPLETION, caller, error, make_bank
from scripted_engine import ids_of, writes

from antefix.bank import Bank
from antefix.errors import ServerError
from antefix.server.keys import Key, Keys
from antefix.server.messages import Finished
from antefix.server.tokens import Tokens


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("served") / "bank")


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
