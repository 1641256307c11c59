"""`antefix serve` as a process: mistakes are one line, its engine's death is survived, a signal ends it in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import BASE, Served, make_files, serving
from test_command_line import ended
from typer.testing import CliRunner

from antefix.cli import app
from antefix.errors import AntefixError


def test_without_a_bank_or_with_wrong_keys_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "keys.toml").write_text("key = []")
    for words, message in (
        (("--bank", "none"), "there is no bank 'none'"),
        (("--api-keys", "keys.toml"), "there is no [[key]] in it"),
        (("--base", "no/such/folder"), "no folder or file 'no/such/folder'"),
    ):
        code, _, errors = ended("serve", "--port", "0", *words, folder=tmp_path)
        said = [line for line in errors.splitlines() if line.startswith("antefix: ")]
        assert (code, len(said)) == (2, 1), errors
        assert message in said[0]


def test_a_taken_port_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "--base", "none", "--port", str(port)])
    assert isinstance(found.exception, AntefixError)
    assert f"cannot listen at 127.0.0.1:{port}" in str(found.exception)


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = CliRunner().invoke(app, ["serve"])
    assert "pip install 'antefix[serve]'" in str(found.exception)


def worker_of(served: Served) -> psutil.Process:
    """The engine's process, which is the one that has the base."""
    (found,) = [
        child for child in psutil.Process(served.process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]  # fmt: skip
    return found


def until(holds: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_who_is_not_done_when_the_time_is_up_is_told(tmp_path: Path) -> None:
    make_files(tmp_path)
    asked = {"model": BASE, "prompt": "x", "max_tokens": 450, "ignore_eos": True}
    with serving(tmp_path, "--grace", "0.1", "--name", BASE) as served, served.client() as client:
        with (
            ThreadPoolExecutor() as pool,
            client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as s,
        ):
            whole = pool.submit(client.post, "/v1/completions", json={**asked, "n": 8})
            lines = s.iter_lines()
            next(lines)
            until(lambda: client.get("/health").json()["running"] > 1, 20)
            served.process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
            reply = whole.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in reply.headers
        assert served.process.wait(30) == 0
        assert all("traceback" not in line for line in served.log())


def test_a_second_signal_takes_the_time_away(tmp_path: Path) -> None:
    make_files(tmp_path)
    asked = {"model": BASE, "prompt": "x", "max_tokens": 450, "ignore_eos": True, "n": 8, "stream": True}
    with serving(tmp_path, "--grace", "600", "--name", BASE) as served, served.client() as client:
        worker = worker_of(served)
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGINT)
            until(lambda: any("stopping" in line["message"] for line in served.log()), 20)
            served.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert served.process.wait(20) == 0
        assert not worker.is_running()
        assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def test_the_death_of_the_engine_and_an_orderly_end(tmp_path: Path) -> None:
    """One server for both: starting it is what takes long."""
    make_files(tmp_path)
    asked = {"model": BASE, "prompt": "x", "max_tokens": 450, "ignore_eos": True, "stream": True}
    with serving(tmp_path, "--grace", "20", "--name", BASE) as served, served.client() as client:
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            os.kill(worker_of(served).pid, signal.SIGKILL)
            *_, last = [line for line in lines if line]
        assert "worker died" in json.loads(last.removeprefix("data: "))["error"]["message"]
        reply = client.get("/health")
        assert (reply.status_code, reply.json()["engine"]) == (503, "restarting")
        refused = client.post("/v1/completions", json={**asked, "stream": False})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
        until(lambda: client.get("/health").status_code == 200, 120)
        assert client.post("/v1/completions", json={**asked, "stream": False, "max_tokens": 3}).status_code == 200
        with client.stream("POST", "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]", "a text that was begun is written to its end"
        assert served.process.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            client.get("/health")
