"""Benches on a tiny base: real workers, real peers; what they measure is not asserted, what they check and say is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_base
from typer.testing import CliRunner

from antefix.benchmarks import decoding, training
from antefix.benchmarks.decoding import DecodingBench, bench_decoding
from antefix.benchmarks.loading import LoadingBench, bench_loading
from antefix.benchmarks.machine import matrix_peak_gflops, read_bandwidth_gb_s
from antefix.benchmarks.memory import MemoryBench, bench_memory
from antefix.benchmarks.peers import PaddedTraining
from antefix.benchmarks.record import Record
from antefix.benchmarks.report import markdown, write_report
from antefix.benchmarks.rounds import ROUNDS_FILE, Kept, Spread, interleave
from antefix.benchmarks.training import TrainingBench, bench_training
from antefix.benchmarks.worker import Worker
from antefix.benchmarks.workload import load_workload, peak_mib
from antefix.cli import app
from antefix.errors import BenchmarkError, CommandError

Watch = Callable[[int, int, str], None]


def unseen(done: int, total: int, what: str) -> None:
    """Nobody looks."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    made = tiny_base("llama")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    rows = [f"name : N{n} | place : P{n % 7},{word} N{n} is at P{n % 7}." for n in range(40) for word in ("So", "Thus")]
    path.write_text("source,target\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


class TestRounds:
    def test_arms_take_turns_in_an_order_that_turns_round(self) -> None:
        seen: list[str] = []

        def arm(name: str) -> Callable[[int], float]:
            return lambda number: seen.append(f"{name}{number}") or float(number)  # type: ignore[func-returns-value]

        rates = interleave({"a": arm("a"), "b": arm("b")}, 3)
        assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
        assert rates == {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}

    def test_a_ratio_is_taken_within_rounds(self) -> None:
        """A machine that slows down by half in the second round changes no ratio."""
        record = Record(bench="x", settings={}, unit="", rounds={"a": [4.0, 2.0], "b": [2.0, 1.0]})
        record.add_ratio("a", "b")
        assert record.ratios == {"a / b": Spread(2.0, 2.0, 2.0)}

    def test_finished_rounds_are_kept_and_an_interrupted_one_is_done_again(self, tmp_path: Path) -> None:
        turns: list[str] = []

        def arm(name: str) -> Callable[[int], float]:
            def turn(number: int) -> float:
                turns.append(f"{name}{number}")
                if turns == ["a0", "b0", "b1", "a1"]:
                    raise KeyboardInterrupt
                return number + 0.5

            return turn

        arms, made_with = {"a": arm("a"), "b": arm("b")}, {"slots": (1, 2)}
        with pytest.raises(KeyboardInterrupt):
            interleave(arms, 3, kept=Kept(tmp_path, made_with))
        assert interleave(arms, 3, kept=Kept(tmp_path, made_with)) == {"a": [0.5, 1.5, 2.5], "b": [0.5, 1.5, 2.5]}
        assert turns == ["a0", "b0", "b1", "a1", "b1", "a1", "a2", "b2"]
        assert interleave({"a": arm("a")}, 1, kept=Kept(tmp_path, made_with)) == {"a": [0.5]}, (
            "other arms, other rounds"
        )

    def test_a_choice_is_made_once(self, tmp_path: Path) -> None:
        assert Kept(tmp_path, {}).choice("pairs", lambda: 16) == 16
        assert Kept(tmp_path, {}).choice("pairs", lambda: 8) == 16

    def test_rounds_of_another_bench_are_refused(self, tmp_path: Path) -> None:
        Kept(tmp_path, {"slots": 1}).add({"a": 1.0})
        with pytest.raises(BenchmarkError, match="with other settings, versions or of another machine: give another"):
            Kept(tmp_path, {"slots": 2})
        (tmp_path / ROUNDS_FILE).write_text("{")
        with pytest.raises(BenchmarkError, match="not a bench's rounds; remove it or give another --out"):
            Kept(tmp_path, {"slots": 1})

    def test_quartiles(self) -> None:
        assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
        assert Spread.of([1.0, 9.0]) == Spread(5.0, 1.0, 9.0)


class TestWorkers:
    def test_the_arms_own_error_is_told(self) -> None:
        with pytest.raises(BenchmarkError, match=r"the arm Spread: TypeError: .*unexpected keyword argument 'nothing'"):
            Worker("antefix.benchmarks.rounds:Spread", {"nothing": 1})

    def test_a_failing_call_leaves_the_arm_at_work(self) -> None:
        with Worker("collections:Counter", {"a": 2}) as worker:
            with pytest.raises(BenchmarkError, match="AttributeError"):
                worker.call("no_such_method")
            assert worker.call("total") == 2

    def test_an_arm_that_dies_is_no_endless_wait(self) -> None:
        with Worker("threading:Event", {}) as worker:
            worker._process.kill()
            with pytest.raises(BenchmarkError, match=r"the arm Event has ended \(code .*\): was memory short\?"):
                worker.call("is_set")


class TestMachine:
    def test_peaks_are_rates(self) -> None:
        slow = matrix_peak_gflops([(8, 8)], [1], torch.float32, seconds_each=0.01)
        assert 0 < slow < matrix_peak_gflops([(256, 256)], [256], torch.float32, seconds_each=0.05)
        assert read_bandwidth_gb_s(8, 0.02) > 0.1

    def test_peak_memory_is_that_of_the_work(self) -> None:
        mebibytes = peak_mib(lambda: torch.ones(64 * 2**18).sum())
        assert 60 < mebibytes < 80


def test_a_sample_is_of_pairs_not_of_sources(base: str, data: str) -> None:
    _, whole = load_workload(base, data, "float32")
    _, sample = load_workload(base, data, "float32", sample=30)
    assert (whole.num_pairs, sample.num_pairs) == (80, 30)
    assert len(sample.examples) > 20, "two targets a source: drawn by source it would be 15"


TRAINING = TrainingBench(base="", data="", precisions=("float32",), pairs_per_step=8, rounds=2, steps_per_round=1)


def test_training(base: str, data: str, tmp_path: Path) -> None:
    turns: list[tuple[int, int, str]] = []
    record = bench_training(
        replace(TRAINING, base=base, data=data, quick=True), lambda done, total, what: turns.append((done, total, what))
    )
    assert set(record.ratios) == {
        "ours, float32 / PEFT sorted, float32", "ours, float32 / PEFT random of 8, float32",
    }  # fmt: skip
    assert all(len(rates) == 2 for rates in record.rounds.values())
    assert [turn for turn in turns if turn[1] == 6][-1] == (5, 6, "ours, float32"), "the last round runs backwards"
    losses = [value for name, value in record.figures.items() if name.startswith("loss")]
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-4 * min(losses)
    assert 0 < record.figures["useful share of the best, float32"] < 1
    write_report(record, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"record.json", "report.md", "ratios.png"}
    kept = json.loads((tmp_path / "report" / "record.json").read_text(encoding="utf-8"))
    assert kept["ratios"].keys() == record.ratios.keys()
    assert "| ours, float32 / PEFT sorted, float32 |" in markdown(record)


def test_training_in_full(base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FORWARD_PAIRS", (4, 8))
    monkeypatch.setattr(training, "STEP_PAIRS", (4, 8))
    monkeypatch.setattr(training, "SLOT_COUNTS", (1, 4))
    monkeypatch.setattr(training, "SOURCE_TOKENS", (2, 5))
    record = bench_training(replace(TRAINING, base=base, data=data), unseen)
    assert "ours, float32 / full fine-tuning sorted, float32" in record.ratios
    assert record.figures["pairs a forward pass, PEFT sorted, float32"] in {4, 8}
    assert [curve.x for curve in record.curves] == ["slots", "source tokens", "pairs a step"]
    for curve in record.curves:
        assert {name: len(points) for name, points in curve.series.items()} == {
            "ours, float32": 2, "PEFT sorted, float32": 2,
        }  # fmt: skip


@pytest.mark.parametrize(("forward_pairs", "num_steps"), [(8, 1), (8, 4), (16, 1), (16, 4), (32, 2)])
def test_the_sorted_peer_gets_pairs_of_every_length(
    base: str, tmp_path: Path, forward_pairs: int, num_steps: int
) -> None:
    """A few steps are as long, in the mean, as the whole sorted epoch that they stand for, and hardly padded."""
    draw = random.Random(0)
    path = tmp_path / "pairs.jsonl"
    rows = (json.dumps({"source": f"number {n}", "target": " ".join(["x"] * draw.randint(1, 60))}) for n in range(4000))
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    arm = PaddedTraining(base, str(path), "float32", "full", 3, 32, forward_pairs, sort=True)
    length = {pair: arm._length(pair) for pair in arm._pairs}
    drawn = [pairs for seed in range(40) for pairs in arm._drawn(seed, num_steps)]
    assert all(len(pairs) == 32 for pairs in drawn)
    lengths = [length[pair] for pairs in drawn for pair in pairs]
    mean = sum(length.values()) / len(length)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.03)
    fed = 0
    for pairs in drawn:
        parts = [pairs[n : n + forward_pairs] for n in range(0, 32, forward_pairs)]
        fed += sum(len(part) * max(length[pair] for pair in part) for part in parts)
    assert fed / len(lengths) < 1.05 * mean


def test_arms_that_do_not_agree_are_not_timed(base: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.TOLERANCE, "float32", -1.0)
    with pytest.raises(BenchmarkError, match="they do not compute the same, so nothing is timed"):
        bench_training(replace(TRAINING, base=base, data=data, quick=True), unseen)


DECODING = DecodingBench(
    base="", data="", precisions=("float32",), batch=4, new_tokens=5, num_slots=3, many_slots=12, rounds=1, curves=False
)


def test_decoding(base: str, data: str) -> None:
    record = bench_decoding(replace(DECODING, base=base, data=data), unseen)
    assert list(record.ratios) == [
        "ours, 3 slots, float32 / bare base, float32",
        "ours, 3 slots, float32 / bare base as transformers loads it, float32",
        "PEFT, 3 slots, float32 / bare base as transformers loads it, float32",
        "ours, 12 slots, float32 / PEFT, 12 slots, float32", "ours, 4 prefixes, float32 / ours, 3 slots, float32",
        "ours, 4 prefixes, float32 / PEFT, 4 prefixes, float32",
    ]  # fmt: skip
    alike = [value for name, value in record.figures.items() if name.startswith("rows that ours and PEFT write alike")]
    assert alike == [4, 4, 4]


def test_decoding_with_weights_of_eight_bits(base: str, data: str) -> None:
    record = bench_decoding(replace(DECODING, base=base, data=data, eight_bits=True), unseen)
    assert list(record.ratios)[-1] == "ours, 3 slots, int8 / ours, 3 slots, float32 beside int8"
    assert record.figures["MiB of weights, int8"] < record.figures["MiB of weights, float32"]  # type: ignore[operator]


def test_arms_that_write_otherwise_are_not_timed(base: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoding.TOLERANCE, "float32", -1.0)
    with pytest.raises(BenchmarkError, match="the logits of ours and PEFT's differ by"):
        bench_decoding(replace(DECODING, base=base, data=data), unseen)


def test_memory(base: str, data: str) -> None:
    record = bench_memory(MemoryBench(base=base, data=data, num_slots=3, pairs_per_step=(8,)), unseen)
    arms = {"bare forward and backward", "ours", "ours, activation checkpointing", "PEFT", "full fine-tuning"}
    assert set(record.curves[0].series) == arms


def test_loading(base: str, tmp_path: Path) -> None:
    record = bench_loading(LoadingBench(base=base, rounds=1, bank_sizes=(3, 20), own_prefixes=5), unseen)
    assert record.figures["s, antefix --help"] < record.figures["s, imports (torch and transformers among them)"]  # type: ignore[operator]
    write_report(record, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_a_file_that_is_not_there_is_told_as_everywhere(base: str) -> None:
    with pytest.raises(BenchmarkError, match=r"^nowhere\.csv: no such file"):
        bench_training(replace(TRAINING, base=base, data="nowhere.csv", quick=True), unseen)


def test_a_precision_that_is_none_is_refused() -> None:
    done = CliRunner().invoke(app, ["bench", "train", "--precision", "float8"])
    assert isinstance(done.exception, CommandError)
    assert str(done.exception) == "--precision float8: of float32 and bfloat16, separated by a comma"


def test_too_few_sources_are_told(base: str, data: str) -> None:
    with pytest.raises(BenchmarkError, match="has 40 sources, the batch needs 99"):
        bench_decoding(replace(DECODING, base=base, data=data, batch=99), unseen)
