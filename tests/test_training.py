"""The training loop: what a step is, what moves, and that an interruption changes nothing."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from conftest import ARCHITECTURES, tiny_base, tiny_method
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from antefix.attach import attached
from antefix.base import Base
from antefix.batches.batch import encoder_decoder_batch, packed_batch
from antefix.batches.form import batch_form
from antefix.batches.head import pair_losses
from antefix.data import Example, Table
from antefix.data.plan import Unit
from antefix.errors import DataError, RecipeError, TrainingError
from antefix.prefix import Prefix
from antefix.training.checkpoint import Progress
from antefix.training.journal import LOG_FILE, read_log
from antefix.training.loop import StepReport
from antefix.training.prepared import Prepared, prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run, train

GENERATIVE = tuple(name for name in ARCHITECTURES if name not in ("bert", "roberta"))


def examples(count: int = 6) -> list[Example]:
    return [
        Example(
            source=Table((("name", f"Inn {n}"), ("price", f"{n} pounds"))),
            targets=(f"Inn {n} asks {n} pounds.", f"For {n} pounds: Inn {n}."),
        )
        for n in range(count)
    ]


def prepared(
    base: Base, method: str = "prefix_tuning", config: dict[str, object] | None = None, **training: object
) -> Prepared:
    short = {"max_steps": 6, "pairs_per_step": 4, "targets_per_row": 2, "evaluations": 2, "tokens_per_batch": 120}
    return prepare(
        base,
        examples(),
        examples(2),
        method=method,
        config={"num_virtual_tokens": 3, "initial_text": "say it", **(config or {})},
        text_format=None,
        decoding=None,
        training=TrainingRecipe.model_validate(short | training),
        data_name="inns",
    )


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in base.model.named_parameters()}


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_prefix_learns_and_the_base_stays(name: str) -> None:
    base = tiny_base(name)
    before, ready = weights(base), prepared(base, max_steps=12, learning_rate=0.05)
    start = ready.module.kept_tensors()
    reports: list[StepReport] = []
    prefix = run(ready, watch=reports.append)
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert not any("antefix" in n for n, _ in base.model.named_parameters())
    assert prefix.tensors.keys() == start.keys()
    assert all(not torch.equal(start[n], t) for n, t in prefix.tensors.items()), "every tensor moves"
    dev = [r.dev_scores["dev_loss"] for r in reports if r.dev_scores]
    assert dev[-1] < reports[0].loss
    assert [r.step for r in reports] == list(range(1, 13))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_how_a_step_is_cut_into_passes_changes_nothing(name: str) -> None:
    tensors = [run(prepared(tiny_base(name), tokens_per_batch=budget, max_steps=2)).tensors for budget in (40, 4000)]
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_packed_rows_train_as_padded_rows_do(name: str) -> None:
    both = [run(prepared(tiny_base(name), packed=packed, max_steps=2)) for packed in (True, False)]
    assert [p.card.training["batch_form"] for p in both] == ["packed", "padded"]
    for key, tensor in both[0].tensors.items():
        torch.testing.assert_close(tensor, both[1].tensors[key], atol=2e-4, rtol=1e-3)


def test_a_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    one, same, other = (run(prepared(tiny_base("llama"), seed=seed)).tensors for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("config", "optimiser"),
    [({}, "adamw"), ({"parametrisation": "network", "hidden_width": 9, "dropout": 0.2}, "adamw"), ({}, "adafactor")],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, config: dict[str, object], optimiser: Any) -> None:
    def ready() -> Prepared:
        return prepare(
            tiny_base("llama"),
            examples(),
            examples(2),
            method="prefix_tuning",
            config={"num_virtual_tokens": 3, **config},
            text_format=None,
            decoding=None,
            training=TrainingRecipe(max_steps=9, pairs_per_step=5, evaluations=3, optimiser=optimiser),
        )

    whole = run(ready(), tmp_path / "whole")
    for stop_after in (1, 4, 5):
        asked = itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            run(ready(), tmp_path / "parts", stop_requested=lambda n=stop_after, a=asked: next(a) == n)
        done = stop_after
        resumed_from: list[int] = []
        parts = run(ready(), tmp_path / "parts", watch=lambda r, seen=resumed_from: seen.append(r.step))
        assert resumed_from[0] == done + 1
        assert all(torch.equal(whole.tensors[k], t) for k, t in parts.tensors.items())
        assert parts.card.scores == whole.card.scores
        (tmp_path / "parts" / "checkpoint.safetensors").unlink()


RECIPE = """
name = "inns"
base = "{base}"

[config]
num_virtual_tokens = 4

[data]
train = "inns.jsonl"

[training]
max_steps = 60
pairs_per_step = 4
evaluations = 6
checkpoint_seconds = 0
"""
ROWS = "".join(
    f'{{"table": [["name", "Inn {n}"], ["price", "{n}"]], "targets": ["Inn {n} asks {n}.", "For {n}: Inn {n}."]}}\n'
    for n in range(30)
)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    base = tiny_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "inns.jsonl").write_text(ROWS, encoding="utf-8")
    (tmp_path / "inns.toml").write_text(RECIPE.format(base=tmp_path / "base"), encoding="utf-8")
    return tmp_path


def command(workplace: Path, *words: str) -> Command:
    return Command("train", "inns.toml", *words, folder=workplace)


def finished(process: Command, code: int = 0) -> str:
    """What it said on stderr."""
    _, errors = process.communicate()
    assert process.returncode == code, errors
    return errors


def killed_after(process: Command, log: Path, steps: int, how: signal.Signals, wait_seconds: float = 0.0) -> int:
    """Waits until `steps` more steps stand in the log, sends the signal, and returns the exit code.

    A process that was faster than its watcher has an exit code of its own choice.
    """
    before = len(read_log(log))
    deadline = time.monotonic() + 120
    while process.poll() is None and len(read_log(log)) < before + steps:
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {steps} steps in two minutes: {process.communicate()}")
        time.sleep(0.001)
    time.sleep(wait_seconds)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode in (0, -how, 128 + how), errors
    return process.returncode


def killed_three_times(workplace: Path, moments: random.Random) -> bool:
    """False where the watcher slept (a busy machine) until a run was over."""
    for _ in range(3):
        steps, wait_seconds = moments.randint(3, 12), moments.uniform(0, 0.02)
        code = killed_after(command(workplace), workplace / "runs/inns" / LOG_FILE, steps, signal.SIGKILL, wait_seconds)
        if code != -signal.SIGKILL:
            return False
    return True


def test_kill_9_at_three_random_moments_loses_no_bit(workplace: Path) -> None:
    finished(command(workplace, "run=whole", "bank=whole_bank"))
    seed = time.time_ns()
    print(f"moments of random.Random({seed})")  # pytest shows it where the test fails
    moments = random.Random(seed)
    for _ in range(5):
        if killed_three_times(workplace, moments):
            break
        shutil.rmtree(workplace / "runs/inns")
        shutil.rmtree(workplace / "bank")
    else:
        pytest.fail("five times a run was over before it could be killed: this machine is too busy to say anything")
    errors = finished(command(workplace))
    assert "going on from the checkpoint" in errors
    one, other = (load_file(workplace / f"{bank}/inns/prefix.safetensors") for bank in ("whole_bank", "bank"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    steps = [row["step"] for row in read_log(workplace / "runs/inns" / LOG_FILE)]
    assert steps == list(range(1, 61)), "the log has every step once"
    assert (workplace / "runs/inns/curve.png").stat().st_size > 5000
    assert not (workplace / "runs/inns/checkpoint.safetensors").exists()

    errors = finished(command(workplace), 2)
    assert errors.splitlines()[-1] == (
        "antefix: bank/inns exists: give the recipe another name, or say --overwrite to train it anew"
    )


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(workplace: Path) -> None:
    process = command(workplace, "training.checkpoint_seconds=3600")
    log = workplace / "runs/inns" / LOG_FILE
    killed_after(process, log, 5, signal.SIGINT)
    assert process.returncode == 130
    steps = len(read_log(log))
    assert 5 <= steps < 60
    errors = finished(command(workplace, "training.checkpoint_seconds=3600", "training.seed=7"), 2)
    assert "holds an unfinished run of another recipe" in errors.splitlines()[-1]
    finished(command(workplace, "training.checkpoint_seconds=3600"))
    assert [row["step"] for row in read_log(log)] == list(range(1, 61))


def test_activation_checkpointing_recomputes_and_changes_nothing() -> None:
    def trained(recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
        base = tiny_base("llama")
        layer = base.model.model.layers[1]
        layer.self_attn.attention_dropout = 0.5
        ready, calls = prepared(base, max_steps=2, evaluations=0, activation_checkpointing=recompute), [0]
        layer.mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        tensors = run(ready).tensors
        assert layer.self_attn.attention_dropout == 0.5
        assert not any(m.training for m in base.model.modules())
        return tensors, calls[0]

    plain, plain_calls = trained(False)
    recomputed, calls = trained(True)
    asking_for_packed_rows = 2
    assert calls - plain_calls == plain_calls - asking_for_packed_rows, "every training pass runs the layer twice"
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, recomputed[key], atol=1e-5, rtol=1e-4)


def test_the_best_step_is_kept_and_patience_ends_the_run() -> None:
    reports: list[StepReport] = []
    wild = {"learning_rate": 100, "schedule": "constant"}
    ready = prepared(tiny_base("llama"), max_steps=40, evaluations=40, patience=1, **wild)
    prefix = run(ready, watch=reports.append)
    scored = {r.step: r.dev_scores["dev_loss"] for r in reports if r.dev_scores}
    assert prefix.card.training["stopped_early"]
    assert prefix.card.training["steps"] == max(scored) < 40
    assert prefix.card.training["kept_step"] == min(scored, key=scored.__getitem__)


def test_bleu_can_choose_the_step() -> None:
    reports: list[StepReport] = []
    prefix = run(prepared(tiny_base("gpt2"), dev_metric="bleu", dev_metric_sources=2), watch=reports.append)
    assert all(set(s) == {"step", "dev_loss", "dev_bleu"} for s in prefix.card.scores["dev"])


def test_a_loss_that_is_no_number_ends_the_run_with_a_reason() -> None:
    ready = prepared(tiny_base("llama"))
    with torch.no_grad():
        next(iter(ready.module.parameters())).fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"step \d: the loss is nan; lower learning_rate"):
        run(ready)


def test_a_dev_score_that_is_no_number_is_never_the_best() -> None:
    progress, recipe = Progress(step=3), TrainingRecipe()
    with pytest.raises(TrainingError, match="step 3: its dev loss is nan; lower learning_rate"):
        progress.note({"dev_loss": math.nan}, recipe)


def test_a_metric_of_a_dev_set_that_is_empty_is_refused() -> None:
    training = TrainingRecipe(dev_metric="bleu")
    with pytest.raises(TrainingError, match=r"training.dev_metric = 'bleu' scores the dev set, and there is none"):
        train(tiny_base("llama"), [Example(source="a", targets=("b",))], dev=(), training=training)


def test_what_is_wrong_is_said_before_training() -> None:
    base = tiny_base("llama")
    with pytest.raises(TrainingError, match="no example has a target"):
        train(base, [Example(source="a"), Example(source="b")])
    with pytest.raises(RecipeError, match="unknown key 'config.slots'"):
        train(base, examples(), slots=3)
    long = Example(source="word " * 200, targets=("x",), where="menus.csv, line 9")
    with pytest.raises(DataError, match=r"menus.csv, line 9: .* do not fit into the base's context of"):
        train(base, [long, *examples()])


def test_a_base_that_cannot_take_packed_rows_says_so() -> None:
    base = tiny_base("llama")
    ready = prepared(base, packed=True)
    assert batch_form(base.model, ready.train_set, None) == "packed"


def test_train_from_python_gives_a_prefix_that_works(tmp_path: Path) -> None:
    base = tiny_base("qwen3")
    prefix = train(base, examples(), training=TrainingRecipe(max_steps=2), num_virtual_tokens=2)
    prefix.save(tmp_path / "inns")
    again = Prefix.load(tmp_path / "inns")
    assert again.card == prefix.card
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with attached(base.model, prefix):
            one = base.model(ids).logits
        with attached(base.model, again):
            assert torch.equal(one, base.model(ids).logits)
        assert not torch.equal(one, base.model(ids).logits)


FORMS = {"llama": packed_batch, "gpt2": packed_batch, "bart": encoder_decoder_batch}
LOWEST = {
    "llama": [f"model.layers.0.self_attn.{p}_proj" for p in "kqv"],
    "gpt2": ["transformer.h.0.attn.c_attn"],
    "bart": [f"model.{part}.layers.0.self_attn.{p}_proj" for part in ("decoder", "encoder") for p in "kqv"],
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_no_gradient_is_made_that_nothing_needs(name: str) -> None:
    """None for a weight of the base, and none for what stands below the lowest slot."""
    base = tiny_base(name)
    needs: dict[str, bool] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, output: needs.__setitem__(path, output.requires_grad)

    products = (nn.Linear, Conv1D)
    handles = [m.register_forward_hook(note(n)) for n, m in base.model.named_modules() if isinstance(m, products)]
    with attached(base.model, tiny_method(base)):
        pair_losses(base.model, FORMS[name](prepared(base).train_set, [Unit(0, (0,))], base.model)).sum().backward()
    for handle in handles:
        handle.remove()
    without = sorted(path for path, needed in needs.items() if not needed)
    assert without == LOWEST[name], "the projections that feed the lowest slots, and nothing above them"
    assert all(p.grad is None for p in base.model.parameters())
