"""`curl` against the running server, as the documentation shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time

import pytest
from served import Served

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


def curl(served: Served, path: str, *words: str) -> str:
    done = subprocess.run(["curl", "-sS", "--max-time", "60", f"{served.address}{path}", *words], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def sent(content: object) -> tuple[str, ...]:
    return ("-H", "Content-Type: application/json", "-d", json.dumps(content))


def test_a_table_and_a_stream(served: Served) -> None:
    asked = {"model": "menus", "table": {"name": "Fern Hill"}, "max_tokens": 9}
    whole = json.loads(curl(served, "/v1/tables", *sent(asked)))["choices"][0]
    lines = curl(served, "/v1/tables", "-N", *sent({**asked, "stream": True})).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_without_the_header_it_says_what_is_missing(served: Served) -> None:
    assert (
        "Content-Type: application/json" in json.loads(curl(served, "/v1/completions", "-d", "{}"))["error"]["message"]
    )


def test_who_goes_away_frees_the_row(served: Served) -> None:
    asked = {"model": "sport", "prompt": "x", "max_tokens": 480, "ignore_eos": True}
    for stream in (False, True):
        process = subprocess.Popen(
            ["curl", "-sN", f"{served.address}/v1/completions", *sent({**asked, "stream": stream})],
            stdout=subprocess.DEVNULL,
        )
        until(lambda: json.loads(curl(served, "/health"))["running"] == 1)
        process.terminate()
        process.wait()
        until(lambda: json.loads(curl(served, "/health"))["running"] == 0)
    page = curl(served, "/metrics")
    (line,) = [line for line in page.splitlines() if line.startswith("antefix_clients_gone_total ")]
    assert float(line.split()[1]) >= 2
    written = [line["written_tokens"] for line in served.log() if line.get("client_gone")]
    assert all(number < 480 for number in written), "the texts were not written to their ends for nobody"


def until(holds: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
