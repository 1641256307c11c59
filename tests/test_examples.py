"""The examples run as they stand, on a tiny model: the prefix moves, the base does not; a warning is an error."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import tiny_base
from nbclient import NotebookClient

from antefix import embedded
from antefix.attach import current_attachment
from antefix.bank import Bank
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("script", ["pytorch_loop.py", "trainer.py", "trl_sft.py"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_foreign_training_loop_trains_a_prefix(
    script: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base(name)
    before = {key: t.clone() for key, t in base.model.state_dict().items()}
    main = runpy.run_path(str(EXAMPLES / script))["main"]
    start = PrefixTuning.build(base, PrefixTuningConfig()).kept_tensors()
    trained = main(base.model, base.tokenizer, steps=3).kept_tensors()
    assert all(not torch.equal(start[key], t) for key, t in trained.items())
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], t) for key, t in base.model.state_dict().items())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert current_attachment(base.model) is None
    assert not list(tmp_path.iterdir())


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, with a tiny model in the place of the embedded base; its plots are drawn."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has one that puts plots into the notebook
    home = Path(os.environ["ANTEFIX_HOME"]) / "bases" / embedded.NAME
    base = tiny_base("llama")
    base.model.save_pretrained(home)
    base.tokenizer.save_pretrained(home)
    notebook = nbformat.read(EXAMPLES / "prefixes.ipynb", as_version=4)
    done = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert sorted(Bank(tmp_path / "bank")) == ["plain", "praise"]
    assert not any(cell.get("outputs") for cell in nbformat.read(EXAMPLES / "prefixes.ipynb", as_version=4).cells)
