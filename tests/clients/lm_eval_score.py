"""lm-evaluation-harness over the running server and in this process: one task of our own, one score.

Not part of the tests (lm-eval is large): `make clients` runs it.
A tiny random model with a prefix; `local-completions` sends token ids with `echo` and `logprobs`, as to any server,
and its sums of log-probabilities are held against those of the model in this process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from served import base_of_server, make_files, serving

import antefix

TASK = """\
task: antefix_colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
THINGS = ["grass", "snow", "coal", "blood", "the sea", "a lemon", "clay", "milk", "soot", "a rose", "moss", "ice"]
COLOURS = ["green", "white", "black", "red", "blue", "yellow", "brown"]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        rows = folder / "rows.jsonl"
        with open(rows, "w", encoding="utf-8") as file:
            for n, thing in enumerate(THINGS):
                row = {"question": f"What colour is {thing}?", "choices": COLOURS, "answer": n % len(COLOURS)}
                file.write(json.dumps(row) + "\n")
        (folder / "task.yaml").write_text(TASK.format(rows=rows))
        with serving(folder) as server:
            over_http = LocalCompletionsAPI(
                model="sport", base_url=f"{server.address}/v1/completions", tokenizer=str(folder / "tiny-llama"),
                tokenizer_backend="huggingface", max_length=500, batch_size=4,
            )  # fmt: skip
            found = simple_evaluate(
                model=over_http, tasks=["antefix_colours"], task_manager=TaskManager(include_path=str(folder)),
                log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
            difference, here = compare(found["samples"]["antefix_colours"], server.bank["sport"])
        there = found["results"]["antefix_colours"]["acc,none"]
        print(json.dumps({"over_http": there, "in_process": here, "largest_difference": difference}))
        assert there == here
        assert difference < 1e-3


def compare(samples: list[dict[str, object]], prefix: antefix.Prefix) -> tuple[float, float]:
    """The largest difference between two sums of log-probabilities, and the accuracy in this process."""
    base, difference, right = base_of_server(), 0.0, 0
    for sample in samples:
        doc = sample["doc"]
        with antefix.attached(base.model, prefix):
            sums = [log_probability(base, f"{doc['question']}", f" {choice}") for choice in doc["choices"]]  # type: ignore[index]
        theirs = [float(one[0]) for one in sample["filtered_resps"]]  # type: ignore[attr-defined]
        difference = max(difference, *(abs(a - b) for a, b in zip(sums, theirs, strict=True)))
        right += max(range(len(sums)), key=sums.__getitem__) == doc["answer"]  # type: ignore[index]
    return difference, right / len(samples)


def log_probability(base: antefix.Base, before: str, text: str) -> float:
    context = base.tokenizer(before)["input_ids"]
    ids = torch.tensor([context + base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        scores = base.model(ids).logits[0, :-1].log_softmax(-1)
    return float(scores.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum())


if __name__ == "__main__":
    main()
