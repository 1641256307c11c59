"""Examples with choices: the losses by hand, the same whatever is padded, trained, kept and chosen with."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import METHOD_CONFIGS, tiny_base, tiny_method
from torch import Tensor
from transformers.optimization import Adafactor
from typer.testing import CliRunner

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.batches.batch import Choices
from antefix.batches.choices import choice_scores
from antefix.batches.form import batch_form, batch_of
from antefix.batches.head import label_losses
from antefix.choices import choose_each
from antefix.cli import app
from antefix.data import read
from antefix.data.encode import Encoded, EncodedExample, Limits
from antefix.data.linearise import TextFormat
from antefix.data.plan import Unit, all_units, microbatches, steps
from antefix.errors import DataError, GenerationError
from antefix.metrics import score
from antefix.prefix import Prefix
from antefix.tasks import RankingTask
from antefix.training.feed import feed_of
from antefix.training.learner import _optimiser
from antefix.training.objectives import RankingWeights, StepSize
from antefix.training.ranking import ranking_loss
from antefix.training.recipe import TrainingRecipe, load_recipe
from antefix.training.schedule import rate_at

CHOICES = ("a long tail", "fins", "six legs or so")
EXAMPLES = [
    antefix.Example(source=f"{noise} {kind} has", targets=(CHOICES[n],), choices=CHOICES)
    for n, kind in enumerate(("cat", "cod", "ant"))
    for noise in ("a", "the", "one", "no")
]


def of_one(right: int = 0) -> Choices:
    return Choices(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([right]))


PROBABILITIES = torch.tensor([0.5, 0.25, 0.8])
"""Of the two tokens of a right choice and the one token of a wrong one."""
SIZE = StepSize(
    num_pairs=1, num_target_tokens=3, longest_target=2, longest_row=4, num_right_tokens=2, num_wrong_tokens=1
)


def loss_of(**weights: float) -> float:
    none = {"language_model": 0.0, "unlikelihood": 0.0, "length_normalised": 0.0}
    chosen = RankingWeights(**{**none, **weights})
    return float(ranking_loss(-PROBABILITIES.log(), torch.tensor([0, 0, 1]), of_one(), SIZE, chosen))


def test_the_losses_by_hand() -> None:
    likely, unlikely = (math.log(0.5) + math.log(0.25)) / 2, math.log(0.8)
    assert loss_of(language_model=1) == pytest.approx(-likely)
    assert loss_of(unlikelihood=1) == pytest.approx(-math.log(1 - 0.8 + 0.01))
    assert loss_of(length_normalised=1) == pytest.approx(
        -math.log(math.exp(likely) / (math.exp(likely) + math.exp(unlikely)))
    )
    assert loss_of(length_normalised=1, length_norm=0) == pytest.approx(-math.log(0.125 / (0.125 + 0.8)))
    assert loss_of(language_model=1, unlikelihood=1, length_normalised=1) == pytest.approx(
        loss_of(language_model=1) + loss_of(unlikelihood=1) + loss_of(length_normalised=1)
    )


def test_the_recipe_is_t_fews() -> None:
    """Adafactor at 3e-3 with steps scaled by a parameter's size, 1,000 steps of eight, 60 of them to warm up."""
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "t_few.toml")
    training = recipe.training
    assert (recipe.method, recipe.task, training.max_steps, training.pairs_per_step) == ("ia3", "ranking", 1000, 8)
    weights = RankingWeights()
    assert set(weights.model_dump().values()) == {1.0}, "losses count alike, and a choice by the mean of its tokens"
    assert (training.ranking, training.evaluations, training.weight_decay) == (weights, 0, 0.0)
    optimiser = _optimiser([{"params": [torch.nn.Parameter(torch.ones(3))]}], training)
    (group,) = optimiser.param_groups
    assert isinstance(optimiser, Adafactor)
    assert (group["scale_parameter"], group["relative_step"]) == (True, False)
    assert training.learning_rate is not None
    rates = [rate_at(step, training.learning_rate, 1000, training) for step in (0, 59, 60, 530, 999)]
    assert rates == pytest.approx([3e-3 / 60, 3e-3, 3e-3, 1.5e-3, 3e-3 / 940])


def test_a_certain_wrong_token_is_a_finite_loss() -> None:
    losses = torch.tensor([1.0, 0.0], requires_grad=True)
    found = ranking_loss(losses, torch.tensor([0, 1]), of_one(), replace(SIZE, num_right_tokens=1), RankingWeights())
    found.backward()
    assert bool(found.detach().isfinite())
    assert bool(losses.grad.isfinite().all())  # type: ignore[union-attr]


def encoded_for(base: Base) -> Encoded:
    return RankingTask().encode(
        EXAMPLES, TextFormat(), base.tokenizer, Limits(context=None),
        for_encoder=bool(base.model.config.is_encoder_decoder),
    )  # fmt: skip


def token_losses(base: Base, encoded: Encoded, units: list[Unit], form: str) -> tuple[Tensor, Tensor, Choices]:
    batch = batch_of(form, encoded, units, base.model)  # type: ignore[arg-type]
    assert batch.choices is not None
    return label_losses(base.model, batch), batch.pair, batch.choices


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bart"])
def test_parts_of_a_step_add_up_and_padding_changes_nothing(name: str) -> None:
    base = tiny_base(name)
    encoded, module = encoded_for(base), tiny_method(base)
    units = all_units(encoded)[:5]
    size = StepSize.of(encoded, units)
    forms = ["encoder_decoder"] if name == "bart" else ["packed", "padded"]
    found = []
    with attached(base.model, module):
        for form in forms:
            for parts in ([units], [[unit] for unit in units]):
                losses = [ranking_loss(*token_losses(base, encoded, p, form), size, RankingWeights()) for p in parts]
                total = torch.stack(losses).sum()
                found.append([total.detach(), *torch.autograd.grad(total, list(module.parameters()))])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_rows_are_packed_whichever_choice_is_right() -> None:
    base = tiny_base("llama")
    encoded = replace(encoded_for(base), examples=tuple(e for e in encoded_for(base).examples if e.right == 2))
    assert batch_form(base.model, encoded, packed=True) == "packed"


def test_choices_of_an_example_stay_together() -> None:
    examples = tuple(EncodedExample((5, 6), ((7, 2),) * (2 + n % 3), right=n % 2) for n in range(7))
    encoded = Encoded(examples, 0, 0, are_choices=True)
    assert encoded.num_pairs == 7
    plan = steps(encoded, pairs_per_step=3, targets_per_row=2, seed=0)
    for _ in range(5):
        units = next(plan)
        assert len(units) == 3
        for unit in units:
            assert sorted(unit.targets) == list(range(len(examples[unit.example].targets)))
        for count in (1, 2):
            parts = microbatches(encoded, units, 4, packed=True, multiple_of=count)
            assert sorted((u for part in parts for u in part), key=repr) == sorted(units, key=repr)


def test_scores_are_means_of_tokens() -> None:
    scores = choice_scores(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 0, 1]), of_one(), 1.0)
    assert scores.tolist() == [[-2.0, -4.0]]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_it_is_trained_kept_and_chosen_with(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    training = TrainingRecipe(
        max_steps=150, pairs_per_step=12, evaluations=5, learning_rate=0.1, schedule="constant", dev_metric="accuracy"
    )
    prefix = antefix.train(
        base, EXAMPLES, task="ranking", dev=EXAMPLES, training=training, num_virtual_tokens=6, initial="normal",
        initial_scale=0.5,
    )  # fmt: skip
    prefix = Prefix.load(prefix.save(tmp_path / "kept"))
    assert prefix.card.task == RankingTask()
    with attached(base.model, prefix):
        found = antefix.label(base, EXAMPLES)
        assert antefix.label(base, EXAMPLES, batch_size=1) == found
    assert score([e.targets for e in EXAMPLES], found, ["accuracy"])["accuracy"] == 1.0
    other = tiny_method(base)
    index = [n % 3 - 1 for n in range(len(EXAMPLES))]
    with attached(base.model, prefix, other, rows=index):
        mixed = dict(choose_each(base, EXAMPLES, RankingTask(), TextFormat.from_dict(prefix.card.text_format)))
    assert all(mixed[n] == found[n] for n, i in enumerate(index) if i == 0)


def test_prefixes_that_rank_in_different_ways_share_no_batch() -> None:
    base = tiny_base("llama")
    training = TrainingRecipe(max_steps=1, evaluations=1)
    other_norm = training.model_copy(update={"ranking": RankingWeights(length_norm=0.5)})
    given = {"task": "ranking", "num_virtual_tokens": 2}
    first, second = (antefix.train(base, EXAMPLES, training=t, **given) for t in (training, other_norm))
    third = antefix.train(base, EXAMPLES, training=training, text_format=TextFormat(separator=":"), **given)
    index = [n % 2 for n in range(len(EXAMPLES))]
    for other in (second, third):
        with attached(base.model, first, other, rows=index):
            with pytest.raises(GenerationError, match="different text formats or length_norm are attached"):
                antefix.label(base, EXAMPLES)
            antefix.label(base, EXAMPLES, task=RankingTask(), text_format=TextFormat())


def test_an_example_whose_right_choice_is_not_known_is_no_lesson() -> None:
    base, unknown = tiny_base("llama"), replace(EXAMPLES[5], targets=(), where="animals.jsonl, line 6")
    message = r"^animals.jsonl, line 6: ranking is learned from right choices, and this example names none"
    for train, dev in (([*EXAMPLES, unknown], EXAMPLES), (EXAMPLES, [*EXAMPLES, unknown])):
        with pytest.raises(DataError, match=message):
            antefix.train(base, train, task="ranking", dev=dev, num_virtual_tokens=2)


def test_choices_are_scored_with_their_second_texts() -> None:
    base = tiny_base("bart")
    examples = [replace(e, condition="(S" if n % 2 else "(NP)") for n, e in enumerate(EXAMPLES)]
    prefix = antefix.train(
        base, examples, task="ranking", method="pip_direct", training=TrainingRecipe(max_steps=2, evaluations=1),
        dev=examples, **METHOD_CONFIGS["pip_direct"],
    )  # fmt: skip
    with attached(base.model, prefix):
        found = antefix.label(base, examples)
        assert antefix.label(base, examples, batch_size=1) == found
        with pytest.raises(DataError, match="this method reads a second text, and the example has none"):
            antefix.label(base, EXAMPLES)


def test_the_dev_loss_is_of_what_is_chosen_by() -> None:
    base = tiny_base("llama")
    encoded, module = encoded_for(base), tiny_method(base)
    recipe = TrainingRecipe(ranking=RankingWeights(length_norm=0.0))
    with attached(base.model, module) as attachment, torch.no_grad():
        feed = feed_of(base.model, module, attachment, encoded, "padded", recipe)
        units = all_units(encoded)[:5]
        losses_N, pair, choices = token_losses(base, encoded, units, "padded")
        scores = choice_scores(losses_N, pair, choices, 0.0)
        wanted = torch.nn.functional.cross_entropy(scores, choices.right_E, reduction="none")
        torch.testing.assert_close(feed.row_losses(feed.batch(units)).float(), wanted, rtol=1e-5, atol=1e-5)


def test_from_a_file_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    base.model.save_pretrained("base")
    base.tokenizer.save_pretrained("base")
    rows = [{"source": e.source, "choices": list(e.choices), "label": e.choices.index(e.targets[0])} for e in EXAMPLES]
    Path("animals.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    Path("recipe.toml").write_text(
        'name = "animals"\nbase = "base"\ndtype = "float32"\ntask = "ranking"\nconfig = {num_virtual_tokens = 4}\n'
        '[data]\ntrain = "animals.jsonl"\ndev = "animals.jsonl"\n'
        '[training]\nmax_steps = 4\nranking = {unlikelihood = 0.5}\ndev_metric = "accuracy"\n',
        encoding="utf-8",
    )
    said = CliRunner().invoke(app, ["train", "recipe.toml"])
    assert said.exit_code == 0, said.output
    words = ["generate", "-p", "bank/animals", "-i", "animals.jsonl", "-o", "taken.jsonl"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    taken = [json.loads(line)["text"] for line in Path("taken.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(taken) == len(EXAMPLES)
    assert set(taken) <= set(CHOICES)
    said = CliRunner().invoke(app, ["generate", "-p", "bank/animals", "a cat has"])
    assert isinstance(said.exception, GenerationError)
    assert "ranks choices: give examples that have some" in str(said.exception)


def test_what_is_no_choice_is_told(tmp_path: Path) -> None:
    def reading(row: dict[str, object]) -> list[antefix.Example]:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return list(read(str(path)))

    assert reading({"source": "x", "choices": ["a", "b"], "target": 1})[0].targets == ("b",)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: 'target' is 2, and there are 2 choices, from 0"):
        reading({"source": "x", "choices": ["a", "b"], "target": 2})
    with pytest.raises(DataError, match="'target' is none of the choices"):
        reading({"source": "x", "choices": ["a", "b"], "target": "c"})
    tokenizer = tiny_base("llama").tokenizer
    for choices, targets, message in [
        ((), (), "ranking needs choices, two or more, all different"),
        (("a", "a"), (), "ranking needs choices, two or more, all different"),
        (("a", "b"), ("c",), "the target of ranking is one of the choices"),
    ]:
        example = antefix.Example(source="x", choices=choices, targets=targets)
        with pytest.raises(DataError, match=message):
            RankingTask().encode([example], TextFormat(), tokenizer, Limits(context=None), for_encoder=False)
