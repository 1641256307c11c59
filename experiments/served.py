"""`antefix serve` in a process of its own, for experiments that ask it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil


@contextlib.contextmanager
def served(words: Sequence[str], log: IO[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's process and its address; in the end it is stopped as Ctrl-C does. words: options of the command."""
    command = [str(Path(sys.executable).with_name("antefix")), "serve", "--port", "0", "--json", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ)
    try:
        yield process, _address(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def own_bytes(process: int) -> int:
    """Of the server and its engine's worker: what is their own, without pages that files share."""
    server = psutil.Process(process)
    every = [server, *server.children(recursive=True)]
    return sum(int(one.memory_full_info().uss) for one in every)


def _address(process: subprocess.Popen[str]) -> str:
    said = ""
    assert process.stdout is not None
    while not said.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start: its log says why")
        said += line
    return str(json.loads(said)["address"])
