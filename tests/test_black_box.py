"""Searches without gradients: what is projected, what a generation costs, the same bits again, and that it finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import DECODER_ONLY, VOCABULARY, tiny_base, tiny_tokenizer
from pydantic import ValidationError
from torch import Tensor

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.batches.labelled import hinge_losses, label_scores, labelled_batch, labelled_losses
from antefix.data.encode import Limits
from antefix.data.linearise import TextFormat
from antefix.data.plan import all_units
from antefix.errors import TrainingError
from antefix.hooks import while_hooked
from antefix.labels import scores_each
from antefix.methods import method_class
from antefix.methods.bbt_v2 import _spread
from antefix.metrics import score
from antefix.parts.word_head import WordHead
from antefix.prefix import Prefix
from antefix.sites import find_sites
from antefix.tasks.classification import ClassificationTask
from antefix.training import black_box
from antefix.training.black_box import GENERATIONS_FILE, Candidate
from antefix.training.prepared import Prepared, prepare
from antefix.training.recipe import TrainingRecipe
from antefix.training.run import run

ANIMALS = [antefix.Example(source=f"{noise} {kind}", targets=("pet" if kind == "cat" else "wild",))
           for kind in ("cat", "elk") for noise in ("a", "the", "one", "my", "no", "her")]  # fmt: skip
WORDS = {"pet": "home", "wild": "out"}


def ready(method: str = "bbt", name: str = "llama", seed: int = 0, **black_box: Any) -> Prepared:
    settings = {"candidates": 60, "population": 10, **black_box}
    return prepare(
        tiny_base(name), ANIMALS, ANIMALS, method=method, text_format=None, decoding=None, task="classification",
        config={"num_virtual_tokens": 4, "dimensions": 9, "alpha": 3.0, "step_size": 1.0}, words=WORDS,
        training=TrainingRecipe(evaluations=3, seed=seed, dev_metric="accuracy", black_box=settings),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
@pytest.mark.parametrize("method", ["bbt", "bbt_v2"])
def test_the_projection_has_the_papers_spread(method: str, name: str) -> None:
    base = tiny_base(name)
    found = method_class(method)
    config = found.Config.model_validate({"num_virtual_tokens": 50, "dimensions": 80, "alpha": 2.0, "step_size": 0.5})
    module = found.build(base, config)
    drawn = module.projection if method == "bbt" else module.get_buffer("projection_0")
    embeddings = base.model.get_input_embeddings()(torch.arange(VOCABULARY))  # Gemma 3 scales what its table holds
    wanted = 2.0 * float(embeddings.std()) / (80**0.5 * 0.5)
    assert float(drawn.std()) == pytest.approx(wanted, rel=0.02)
    moved = drawn @ (0.5 * torch.randn(80))
    assert float(moved.std()) == pytest.approx(2.0 * float(embeddings.std()), rel=0.2), "what a first step moves by"


def test_a_layers_projection_follows_its_states() -> None:
    base = tiny_base("llama")
    found = method_class("bbt_v2")
    module = found.build(base, found.Config.model_validate({"num_virtual_tokens": 40, "dimensions": 50}))
    spreads = [float(module.get_buffer(f"projection_{n}").std()) for n in range(3)]
    with torch.no_grad():
        states = base.model(inputs_embeds=module.first_rows[None], output_hidden_states=True).hidden_states
    given = [_spread(states[n].flatten()) for n in (1, 2)]
    alpha, sigma = 0.2, 0.2
    assert spreads[1:] == pytest.approx([alpha * s / (50**0.5 * sigma) for s in given], rel=0.02)
    assert spreads[0] < spreads[1] < spreads[2], "states grow from layer to layer here"
    assert [len(p) for p in module.searched()] == [50, 50, 50]


def granite() -> Base:
    """Its logits are an eighth of what its output head gives."""
    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    model = transformers.GraniteForCausalLM(config).eval().requires_grad_(False)
    return Base(model, tiny_tokenizer(), "tiny-granite")


@pytest.mark.parametrize("name", [*DECODER_ONLY, "granite"])
def test_a_words_score_is_its_logit(name: str) -> None:
    base = granite() if name == "granite" else tiny_base(name)
    module = method_class("bitfit").build(base, method_class("bitfit").Config())
    module.head = WordHead(base.model, [7, 200, 31])
    task = ClassificationTask(labels=("a", "b", "c"), word_ids=(7, 200, 31))
    rows = [antefix.Example(source="a cat", targets=("a",)), antefix.Example(source="one elk too", targets=("c",))]
    encoded = task.encode(rows, TextFormat(), base.tokenizer, Limits(context=None), for_encoder=False)
    batch = labelled_batch(encoded, all_units(encoded), base.model)
    with torch.no_grad(), attached(base.model, module):
        wanted = torch.stack([base.model(torch.tensor([e.source])).logits[0, -1] for e in encoded.examples])
        scores = label_scores(base.model, module.head, batch)
        answered = {n: s for n, _, s in scores_each(base, rows, task=task)}
    for found in (scores, torch.cat([answered[n] for n in range(len(rows))])):
        torch.testing.assert_close(found, wanted[:, [7, 200, 31]], rtol=1e-4, atol=1e-4)


def test_hinge_by_hand() -> None:
    """Scores 3, 1.5 and 0 with the first right: the second comes within the margin of 2 by a half."""

    class Fixed(WordHead):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, states_NC: Tensor) -> Tensor:
            return torch.tensor([[3.0, 1.5, 0.0]]).expand(len(states_NC), -1)

    base = tiny_base("llama")
    task = ClassificationTask(labels=("a", "b", "c"))
    rows = [antefix.Example(source="x", targets=("a",)), antefix.Example(source="y", targets=("c",))]
    encoded = task.encode(rows, TextFormat(), base.tokenizer, Limits(context=None), for_encoder=False)
    batch = labelled_batch(encoded, all_units(encoded), base.model)
    assert hinge_losses(base.model, Fixed(), batch, black_box.MARGIN).tolist() == [0.5, 5.0 + 3.5]


@pytest.mark.parametrize("method", ["bbt", "bbt_v2"])
@pytest.mark.parametrize("loss", ["cross_entropy", "hinge"])
def test_a_population_in_one_batch_is_one_candidate_after_another(method: str, loss: str) -> None:
    one, together = (run(ready(method, loss=loss, at_once=n)) for n in (1, None))
    assert one.tensors.keys() == together.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, together.tensors[name], rtol=1e-3, atol=1e-4)


def test_layers_take_turns_from_the_lowest_with_the_others_at_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of BBTv2 by hand: which layer is tried in a generation, and where the others stand meanwhile."""
    seen: list[tuple[int, list[list[float]]]] = []

    def watched(model: Any, module: Any, point: Any, values: Any, feed: Any, recipe: Any) -> list[float]:
        points = module.searched()
        turn = next(n for n, p in enumerate(points) if p is point)
        seen.append((turn, [p.tolist() for p in points]))
        losses = [float(np.square(np.asarray(v) - turn - 1).sum()) for v in values]
        tried[turn] += list(zip(losses, [np.asarray(v) for v in values], strict=True))
        return losses

    monkeypatch.setattr(black_box, "_losses", watched)
    prepared = ready("bbt_v2")
    tried: list[list[tuple[float, Any]]] = [[] for _ in prepared.module.searched()]
    best: list[list[list[float]]] = []

    def note(report: Any) -> None:
        best.append([min(t, key=lambda one: one[0])[1].tolist() if t else [0.0] * 9 for t in tried])

    run(prepared, watch=note)
    assert [turn for turn, _ in seen] == [0, 1, 2, 0, 1, 2]
    for n, (_, points) in enumerate(seen):
        wanted = best[n - 1] if n else [[0.0] * 9] * 3
        for found, value in zip(points, wanted, strict=True):
            assert found == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_candidates_in_one_batch_have_the_losses_of_each() -> None:
    prepared = ready()
    model, module, data = prepared.base.model, prepared.module, prepared.train_set
    candidates = []
    for _ in range(3):
        with torch.no_grad():
            module.searched()[0].normal_()
            candidates.append(Candidate(module))
    units = all_units(data)
    assert module.head is not None
    with torch.no_grad():
        alone = []
        for candidate in candidates:
            with attached(model, candidate):
                alone.append(labelled_losses(model, module.head, labelled_batch(data, units, model)))
        rows = [n for _ in units for n in range(3)]
        with attached(model, *candidates, rows=rows):
            batch = labelled_batch(data, [unit for unit in units for _ in range(3)], model)
            mixed = labelled_losses(model, module.head, batch).view(-1, 3).T
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "packed"), [("llama", True), ("llama", False), ("bart", None)])
def test_candidates_rank_together_as_they_do_alone(name: str, packed: bool | None) -> None:
    """Examples with unlike numbers of choices: a row of the batch is a choice, packed an example."""
    rows = [
        antefix.Example(source="a cat", targets=("purrs",), choices=("purrs", "barks")),
        antefix.Example(source="an elk", targets=("grazes a lot",), choices=("swims", "flies", "grazes a lot", "is")),
    ]
    found: dict[int | None, list[float]] = {}
    for at_once in (1, None):
        settings = {"candidates": 10, "population": 5, "at_once": at_once}
        prepared = prepare(
            tiny_base(name), rows, rows, method="bbt", text_format=None, decoding=None, task="ranking",
            config={"num_virtual_tokens": 3, "dimensions": 4, "alpha": 5.0},
            training=TrainingRecipe(evaluations=1, packed=packed, black_box=settings),
        )  # fmt: skip
        reports: list[float] = []
        run(prepared, watch=lambda report, reports=reports: reports.append(report.loss))
        found[at_once] = reports
    assert found[None] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_of_every_layer_are_added_projections(name: str) -> None:
    """As the paper has it, written out: A_j z_j added to the prompt's states at the input of every layer j."""
    base = tiny_base(name)
    found = method_class("bbt_v2")
    config = found.Config.model_validate({"num_virtual_tokens": 4, "dimensions": 6, "alpha": 2.0})
    module = found.build(base, config).requires_grad_(False)
    points = module.searched()
    for n, point in enumerate(points):
        point.copy_(torch.randn(6, generator=torch.Generator().manual_seed(n)))
    ids = torch.randint(3, 200, (1, 7), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        with attached(base.model, module):
            wanted = base.model(ids).logits
        words = base.model.get_input_embeddings()(ids)
        layers = [base.model.get_submodule(s.layer_module) for s in find_sites(base.model).of_kinds(("self",))]

        def add(number: int) -> Any:
            def hook(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                states = (args[0] if args else kwargs["hidden_states"]).clone()
                states[:, :4] += (module.get_buffer(f"projection_{number}") @ points[number]).view(4, -1)
                return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

            return hook

        with while_hooked([m.register_forward_pre_hook(add(n), with_kwargs=True) for n, m in enumerate(layers)]):
            logits = base.model(inputs_embeds=torch.cat([module.first_rows[None], words], dim=1)).logits
    torch.testing.assert_close(wanted, logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_prompt_is_the_projected_point_beside_the_fixed_rows(name: str) -> None:
    base = tiny_base(name)
    found = method_class("bbt")
    config = found.Config.model_validate({"num_virtual_tokens": 3, "dimensions": 5, "alpha": 2.0})
    module = found.build(base, config).requires_grad_(False)
    (point,) = module.searched()
    point.copy_(torch.randn(5, generator=torch.Generator().manual_seed(1)))
    rows = module.first_rows + (module.projection @ point).view(3, -1)
    soft = method_class("prompt_tuning")
    config = soft.Config.model_validate({"num_virtual_tokens": 3})
    plain = soft.build(base, config).requires_grad_(False)
    next(iter(plain.parameters())).copy_(rows)
    ids = torch.randint(3, 200, (1, 7), generator=torch.Generator().manual_seed(9))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "bart" else {})
    with torch.no_grad():
        logits = []
        for one in (module, plain):
            with attached(base.model, one):
                logits.append(base.model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_spread_of_what_is_cut_off_five_times() -> None:
    values = np.array([*np.linspace(-1, 1, 200), 50.0, -80.0])
    for _ in range(5):
        mean, deviation = values.mean(), values.std(ddof=1)
        values = np.clip(values, mean - 3 * deviation, mean + 3 * deviation)
    wanted = float(values.std(ddof=1))
    assert _spread(torch.tensor([*np.linspace(-1, 1, 200), 50.0, -80.0])) == pytest.approx(wanted, rel=1e-4)
    assert wanted < 3


def test_who_else_draws_changes_nothing_and_is_not_changed() -> None:
    np.random.seed(5)
    wanted = np.random.rand(3)
    np.random.seed(5)
    quiet = run(ready("bbt_v2", seed=-1)).tensors
    assert np.random.rand(3).tolist() == wanted.tolist()
    noisy = run(ready("bbt_v2", seed=-1), watch=lambda report: np.random.rand() and None).tensors
    assert all(torch.equal(quiet[name], noisy[name]) for name in quiet)


@pytest.mark.parametrize("method", ["bbt", "bbt_v2"])
def test_it_finds_without_a_gradient(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a gradient was asked for")

    for place, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(place, name, refuse)
    prepared = ready(method, candidates=600)
    prefix = Prefix.load(run(prepared).save(tmp_path / "kept"))
    base = prepared.base
    with attached(base.model, prefix):
        found = antefix.label(base, ANIMALS)
    assert score([e.targets for e in ANIMALS], found, ["accuracy"])["accuracy"] == 1.0
    assert all(p.grad is None for p in base.model.parameters())
    assert prefix.card.training["steps"] == 60


def test_a_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    one, same, other = (run(ready(seed=seed)).tensors for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["bbt", "bbt_v2"])
def test_an_interrupted_search_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = run(ready(method), tmp_path / "whole")
    asked = itertools.count(1)
    for stop_after in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            run(ready(method), tmp_path / "parts", stop_requested=lambda n=stop_after: next(asked) % n == 0)
    path = tmp_path / "parts" / GENERATIONS_FILE
    path.write_text(path.read_text(encoding="utf-8") + '{"losses": [1.0,', encoding="utf-8")  # as a crash would
    seen: list[int] = []
    parts = run(ready(method), tmp_path / "parts", watch=lambda report: seen.append(report.step))
    assert seen[0] == 4
    assert all(torch.equal(whole.tensors[name], t) for name, t in parts.tensors.items())
    assert parts.card.scores == whole.card.scores
    known = [json.loads(line)["seconds"] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(known) == whole.card.training["steps"]
    assert parts.card.training["seconds"] == pytest.approx(sum(known), abs=0.1), "of all sittings"
    with pytest.raises(TrainingError, match="holds an unfinished run of another recipe"):
        run(ready(method, seed=3), tmp_path / "parts")


def test_texts_are_searched_for_too() -> None:
    examples = [antefix.Example(source=f"text {n}", targets=(f"word {n % 2}",)) for n in range(6)]
    training = TrainingRecipe(evaluations=1, black_box={"candidates": 20, "population": 5})
    for name in ("bart", "gpt2"):  # texts, in an encoder-decoder and packed
        base = tiny_base(name)
        prefix = antefix.train(
            base, examples, dev=examples, method="bbt", training=training, num_virtual_tokens=3, dimensions=5
        )
        assert prefix.card.scores["dev"][-1]["step"] == 4


def test_several_processes_do_not_search_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="without gradients runs in one process: start it without a launcher"):
        run(ready(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_searched_is_told() -> None:
    base = tiny_base("llama")
    with pytest.raises(TrainingError, match="bbt learns no head, without gradients: give a word for every label"):
        antefix.train(base, ANIMALS, method="bbt", task="classification")
    with pytest.raises(TrainingError, match=r"candidates = 25: a generation of 10 for each of 3 vectors takes 30"):
        run(ready("bbt_v2", candidates=25))
    with pytest.raises(TrainingError, match=r"bbt\+ia3: what is found without gradients is searched alone"):
        antefix.train(base, ANIMALS, method="bbt+ia3", bbt={"num_virtual_tokens": 2, "dimensions": 5}, ia3={})
    texts = [antefix.Example(source="a", targets=("b",)), antefix.Example(source="c", targets=("d",))]
    training = TrainingRecipe(black_box={"candidates": 20, "population": 5, "loss": "hinge"})
    with pytest.raises(TrainingError, match="'hinge' is for labels: leave it out"):
        antefix.train(base, texts, method="bbt", training=training, dimensions=5, num_virtual_tokens=2)


def test_a_population_that_pycma_breaks_off_with_is_refused() -> None:
    with pytest.raises(ValidationError, match="population"):
        TrainingRecipe(black_box={"population": 2})
