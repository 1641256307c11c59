"""The examples run as they stand, on a tiny model: the prefix moves, the base does not; a warning is an error."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from conftest import tiny_base

from antefix.attach import current_attachment
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
