"""Telling true triples from false ones: negatives, texts, PALT's parts, ranks, and the whole chain on a small graph."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ENCODER_ONLY, tiny_base, tiny_batch, tiny_method
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.cli import app
from antefix.data.example import Triples
from antefix.data.linearise import TextFormat
from antefix.data.plan import steps
from antefix.errors import DataError, MetricError, PrefixError
from antefix.link_prediction import (
    classification_scores,
    likelihoods,
    link_ranks,
    link_scores,
)
from antefix.methods import method_class
from antefix.metrics.ranks import rank, rank_scores
from antefix.prefix import Prefix
from antefix.sites import find_sites
from antefix.tasks.triples import (
    Triple,
    TripleEncoder,
    TriplesTask,
    corrupted,
    true_triples,
    with_negatives,
    with_one_negative,
)
from antefix.training.prepared import Prepared, prepare
from antefix.training.recipe import TrainingRecipe

ANIMALS, FOODS = ("cat", "dog", "cow", "hen"), ("fish", "bone", "hay", "corn")
EATS: list[Triple] = [(animal, "eats", food) for animal, food in zip(ANIMALS, FOODS, strict=True)]
GRAPH = [antefix.Example(source=Triples((triple,)), targets=("true",)) for triple in EATS]
GRAPH += [antefix.Example(source=Triples(((food, "feeds", animal),))) for animal, _, food in EATS]


class TestRanks:
    def test_ties_share_their_places(self) -> None:
        assert rank(0.5, [0.9, 0.4, 0.1]) == 2
        assert rank(0.5, [0.9, 0.5, 0.5, 0.1]) == 3, "second, third or fourth: the third on average"
        assert rank(0.0, [0.0] * 10) == 6, "a model that tells nothing apart stands in the middle"
        for right, others in ((math.nan, [0.1]), (0.1, [0.2, math.nan])):
            with pytest.raises(MetricError, match="a score is no number"):
                rank(right, others)

    def test_scores_by_hand(self) -> None:
        found = rank_scores([1, 2, 4, 20])
        assert found == {
            "mr": 6.75,
            "mrr": pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 20) / 4),
            "hits_at_1": 0.25,
            "hits_at_3": 0.5,
            "hits_at_10": 0.75,
        }
        assert rank_scores([1.5])["hits_at_1"] == 0

    def test_known_triples_are_left_out_for_head_and_tail(self) -> None:
        score = {("a", "r", "b"): 0.5, ("c", "r", "b"): 0.9, ("d", "r", "b"): 0.7, ("a", "r", "d"): 0.5}
        asked: list[Triple] = []

        def likelihood(triples: Sequence[Triple]) -> list[float]:
            asked.extend(triples)
            return [score.get(triple, 0.0) for triple in triples]

        known = {("a", "r", "b"), ("c", "r", "b")}
        assert link_ranks(likelihood, [("a", "r", "b")], ["a", "b", "c", "d"], known) == [2, 1.5]
        assert ("c", "r", "b") not in asked
        assert len(asked) == len(set(asked)), "nothing is scored twice"
        assert link_ranks(likelihood, [("a", "r", "b")], ["a", "b", "c", "d"], set()) == [3, 1.5]

    def test_what_other_sets_hold_is_known(self) -> None:
        """The training set's own answer is likelier than the test set's, and no wrong one."""
        score = {("a", "r", "b"): 0.5, ("a", "r", "c"): 0.9, ("b", "r", "b"): 0.1, ("c", "r", "b"): 0.2}
        test, known = ([antefix.Example(source=Triples((triple,)))] for triple in (("a", "r", "b"), ("a", "r", "c")))
        found = link_scores(lambda triples: [score.get(t, 0.0) for t in triples], test, known)
        assert (found["mr"], found["hits_at_1"]) == (1, 1)

    def test_a_threshold_is_chosen_on_the_dev_set(self) -> None:
        truth = {"a": 0.2, "b": 0.15, "c": 0.1, "d": 0.05}

        def example(name: str, label: str) -> antefix.Example:
            return antefix.Example(source=Triples(((name, "is", "it"),)), targets=(label,))

        dev = [example("a", "true"), example("c", "false")]
        test = [example("b", "true"), example("d", "false"), example("c", "true"), example("a", "true")]
        found = classification_scores(lambda triples: [truth[head] for head, _, _ in triples], dev, test)
        assert found == {"threshold": 0.101, "dev_accuracy": 1.0, "accuracy": 0.75}
        with pytest.raises(DataError, match="the dev set holds no triple that could be classified"):
            classification_scores(lambda triples: [], [], test)


class TestNegatives:
    def test_every_place_is_changed_as_often_and_nothing_known_comes_of_it(self) -> None:
        made = with_negatives(GRAPH, 3, seed=0)
        known = set(true_triples(GRAPH))
        assert true_triples(made) == true_triples(GRAPH)
        assert len(made) == len(GRAPH) * (1 + 3 * 3)
        for start in range(0, len(made), 10):
            true, *false = (e.source.triples[0] for e in made[start : start + 10])  # type: ignore[union-attr]
            places = [[n for n in range(3) if other[n] != true[n]] for other in false]
            assert places == [[0]] * 3 + [[1]] * 3 + [[2]] * 3
            assert not known & set(false)
        assert all(e.targets == ("false",) for n, e in enumerate(made) if n % 10)

    def test_every_epoch_has_its_own(self) -> None:
        made = with_negatives(GRAPH, 5, seed=0, num_draws=3)
        share = len(made) // 3
        draws = [made[share * n : share * (n + 1)] for n in range(3)]
        assert all([is_true.targets for is_true in d] == [e.targets for e in draws[0]] for d in draws)
        assert draws[0] != draws[1] != draws[2]
        assert made == with_negatives(GRAPH, 5, seed=0, num_draws=3)
        assert made != with_negatives(GRAPH, 5, seed=1, num_draws=3)

    def test_all_that_is_unknown_is_as_likely(self) -> None:
        known = {("a", "r", name) for name in "abcdef"}
        draw = random.Random(0)
        found = [corrupted(("a", "r", "a"), 2, "abcdefgh", known, draw) for _ in range(2000)]
        assert 900 < found.count(("a", "r", "g")) < 1100
        assert found.count(("a", "r", "g")) + found.count(("a", "r", "h")) == 2000
        assert corrupted(("a", "r", "a"), 2, "abcdef", known, draw) is None, "there is no false one"

    def test_what_a_set_says_is_false_is_kept(self) -> None:
        false = antefix.Example(source=Triples((("cat", "eats", "hay"),)), targets=("false",))
        made = with_negatives([*GRAPH, false], 1, seed=0)
        assert made[-1] == false
        assert with_one_negative([*GRAPH, false], true_triples(GRAPH), 0) == [*GRAPH, false]
        told_apart = with_one_negative(GRAPH, set(true_triples(GRAPH)), 0)
        assert [e.targets for e in told_apart[8:]] == [("false",)] * 8

    def test_false_ones_to_test_with_have_another_head_or_another_tail(self) -> None:
        true, known = GRAPH * 20, set(true_triples(GRAPH))
        false = true_triples(replace(e, targets=()) for e in with_one_negative(true, known, 0)[len(true) :])
        assert len(false) == len(true)
        assert not known & set(false)
        places = []
        for one, other in zip(true_triples(true), false, strict=True):
            (place,) = [n for n in range(3) if one[n] != other[n]]
            places.append(place)
            assert other[place] in {e for t in known for e in (t[0], t[2])}
        assert set(places) == {0, 2}
        assert abs(places.count(0) - len(places) / 2) < 25

    def test_an_epoch_of_training_sees_one_draw(self) -> None:
        prepared = prepared_for(tiny_base("bert"), TrainingRecipe(epochs=2, pairs_per_step=8, negatives=1))
        share = len(GRAPH) * 4
        assert prepared.train_set.num_draws == 2
        assert prepared.num_steps == 2 * share // 8
        assert (prepared.train_set.pairs_of_epoch, prepared.train_set.num_pairs) == (share, 2 * share)
        plan = steps(prepared.train_set, pairs_per_step=8, targets_per_row=2, seed=0)
        seen = [sorted(u.example for units in islice(plan, share // 8) for u in units) for _ in range(3)]
        assert seen == [[*range(share)], [*range(share, 2 * share)], [*range(share)]]
        assert prepared.dev_set.num_pairs == share


def prepared_for(base: Base, training: TrainingRecipe, method: str = "palt", **config: object) -> Prepared:
    return prepare(
        base, GRAPH, GRAPH, method=method, config=config, text_format=None, decoding=None, training=training,
        task="triples",
    )  # fmt: skip


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, pairs as BERT has them."""
    tokenizer: PreTrainedTokenizerFast = tiny_base("bert").tokenizer  # type: ignore[assignment]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


class TestTexts:
    def test_an_encoder_gets_a_pair_with_prompts_around(self) -> None:
        tokenizer = pair_tokenizer()
        base = Base(tiny_base("bert").model, tokenizer, "tiny-bert")
        module = tiny_method(base, "palt", begin=2, middle=1, end=1)
        text_format = module.with_symbols(TextFormat(linearise="triples"))
        new = base.tokenizer_with(module.symbols)
        ids, cut = TripleEncoder(text_format, new, for_encoder=True)(Triples((("ab", "c", "d"),)))
        a, b, c, d, space = (tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "abcd ")
        assert ids == [1, 263, 264, a, b, space, c, 265, 2, d, 266, 2]
        assert not cut
        plain, _ = TripleEncoder(TextFormat(), tokenizer, for_encoder=True)(Triples((("ab", "c", "d"),)))
        assert plain == [1, a, b, space, c, 2, d, 2]

    def test_the_longer_text_is_cut_and_prompts_never(self) -> None:
        tokenizer = pair_tokenizer()
        text_format = TextFormat(before_source="!", max_source_tokens=5)
        ids, cut = TripleEncoder(text_format, tokenizer, for_encoder=True)(Triples((("abc", "d", "efg"),)))
        assert cut
        assert tokenizer.decode(ids) == "<s>!ab</s>efg</s>"

    def test_a_causal_base_gets_one_text(self) -> None:
        tokenizer = tiny_base("llama").tokenizer
        task = TriplesTask.of([])
        ids, places, _ = task.encoder(TextFormat(), tokenizer, for_encoder=False)(Triples((("a", "b", "c"),)))
        assert tokenizer.decode(ids) == "a b\nc\n"
        assert places == [len(ids) - 1]


class TestPalt:
    @pytest.mark.parametrize("name", ENCODER_ONLY)
    def test_untrained_it_is_the_base(self, name: str) -> None:
        base, batch = tiny_base(name), tiny_batch(name, "right")
        module = tiny_method(base, "palt", initial_scale=0.0)
        with torch.no_grad():
            bare = base.model(**batch).logits
            with attached(base.model, module):
                torch.testing.assert_close(base.model(**batch).logits, bare, rtol=0, atol=0)

    def test_it_has_as_many_values_as_the_formula_says(self) -> None:
        module = tiny_method(tiny_base("bert"), "palt", begin=3, middle=2, end=1, embedding_width=512)
        n, d = 6, 48
        trained = sum(p.numel() for p in module.parameters())
        assert trained == 512 * n + (512 * d + d) + (d * d + d) + 3 * (d * d + d)
        assert sum(t.numel() for t in module.kept_tensors().values()) == n * d + 3 * (d * d + d)

    @pytest.mark.parametrize(("num_layers", "wanted"), [(1, [0]), (3, [1, 2]), (6, [2, 5]), (12, [6, 11])])
    def test_the_middle_layer_and_the_last_are_calibrated(self, num_layers: int, wanted: list[int]) -> None:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=99, hidden_size=12, num_hidden_layers=num_layers, num_attention_heads=2, intermediate_size=8
        )
        base = Base(BertModel(config).eval(), tiny_base("bert").tokenizer, "deep")
        names = [n for n in tiny_method(base, "palt").linear_parts() if "attention" in n]
        assert names == [f"encoder.layer.{n}.attention.output.LayerNorm" for n in wanted]

    def test_by_hand(self) -> None:
        """Rows of prompts in the embeddings, and square maps where the equations have them."""
        base = tiny_base("bert")
        module = tiny_method(base, "palt", layers=[0, 2])
        kept, bert = module.kept_tensors(), base.model.bert
        ids = torch.tensor([[5, 263, 264, 9, 265, 7, 266, 2, 0, 0], [5, 9, 9, 9, 264, 7, 6, 6, 6, 2]])
        mask = ids.ne(0).long()
        with attached(base.model, module), torch.no_grad():
            found = base.model(input_ids=ids, attention_mask=mask).logits
        table = torch.cat([bert.embeddings.word_embeddings.weight, kept["prompts"]])
        bert.embeddings.word_embeddings = nn.Embedding.from_pretrained(table)
        blocks = [bert.encoder.layer[n].attention.output.LayerNorm for n in (0, 2)]
        names = ["embeddings.word_embeddings", *(f"encoder.layer.{n}.attention.output.LayerNorm" for n in (0, 2))]
        for layer, name in zip((bert.embeddings.word_embeddings, *blocks), names, strict=True):
            weight, bias = kept[f"bert.{name}.weight"], kept[f"bert.{name}.bias"]

            def calibrated(module: nn.Module, args: object, x: Tensor, w: Tensor = weight, b: Tensor = bias) -> Tensor:
                return x + x @ w.T + b

            layer.register_forward_hook(calibrated)
        with torch.no_grad():
            wanted = base.model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ENCODER_ONLY)
    def test_norms_that_feed_feed_forward_layers_are_found(self, name: str) -> None:
        model = tiny_base(name).model
        layers = find_sites(model).layers
        first = [s.name for s in layers.linear if s.role == "feed_forward_in"]
        fed = {norm.feeds: norm.name for norm in layers.norms}
        assert [fed[n].rpartition(".")[0] for n in first] == [
            n.replace("intermediate.dense", "attention.output") for n in first
        ]

    def test_what_cannot_be_is_told(self) -> None:
        found = method_class("palt")
        with pytest.raises(PrefixError, match="palt needs an encoder, such as BERT or MiniLM"):
            found.build(tiny_base("llama"), found.Config())
        with pytest.raises(PrefixError, match="there is no layer 7 with a norm before its feed-forward layers"):
            tiny_method(tiny_base("bert"), "palt", layers=[7])
        texts = [antefix.Example(source=text, targets=(text,)) for text in "ab"]
        with pytest.raises(PrefixError, match="palt is asked whether triples are true: set task = 'triples'"):
            antefix.train(tiny_base("bert"), texts, dev=texts, method="palt", task="classification")
        with pytest.raises(DataError, match="triples are needed, one a row"):
            antefix.train(tiny_base("bert"), texts, dev=texts, method="palt", task="triples")


MEMORISED = TrainingRecipe(
    max_steps=200, pairs_per_step=32, evaluations=2, learning_rate=0.01, schedule="constant", negatives=3
)


@pytest.mark.parametrize(("name", "method"), [("bert", "palt"), ("llama", "lora")])
def test_a_graph_is_learned_by_heart(name: str, method: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    prefix = antefix.train(base, GRAPH, dev=GRAPH, method=method, task="triples", training=MEMORISED)
    loaded = Prefix.load(prefix.save(tmp_path / "kept"))
    assert loaded.card.task == TriplesTask(labels=("true", "false"))
    false = [("cat", "eats", "hay"), ("fish", "feeds", "hen")]
    with attached(base.model, loaded):
        true_ones, false_ones = likelihoods(base, true_triples(GRAPH)), likelihoods(base, false)
        labels = antefix.label(base, [Triples((EATS[0],)), Triples((false[0],))])
        scores = link_scores(lambda t: likelihoods(base, t), GRAPH[:3], GRAPH)
    assert min(true_ones) > 0.5 > max(false_ones), "class 0 is the true one"
    assert labels == ["true", "false"]
    assert scores["mr"] < 2.5, "by chance it would be above 4"


def test_rows_of_unlike_prefixes_read_prompts_of_their_own() -> None:
    base = tiny_base("bert")
    training = MEMORISED.model_copy(update={"max_steps": 3})
    prefixes = [
        antefix.train(base, GRAPH, dev=GRAPH, method=method, task="triples", training=training, **config)
        for method, config in (
            ("palt", {"begin": 3, "middle": 0, "end": 0}), ("lora", {}), ("palt", {"begin": 1, "middle": 0, "end": 1})
        )
    ]  # fmt: skip
    sources = [e.source for e in GRAPH[:4]]
    alone = []
    for prefix in prefixes:
        with attached(base.model, prefix):
            alone.append(likelihoods(base, EATS))
    with attached(base.model, *prefixes, rows=[0, 1, 2, 0]):
        mixed = likelihoods(base, EATS)
        assert len(antefix.label(base, sources)) == 4
    wanted = [alone[n][row] for row, n in enumerate((0, 1, 2, 0))]
    torch.testing.assert_close(torch.tensor(mixed), torch.tensor(wanted))


def test_a_union_has_the_prompts_of_its_member() -> None:
    training = MEMORISED.model_copy(update={"max_steps": 2})
    base = tiny_base("bert")
    prefix = antefix.train(base, GRAPH, dev=GRAPH, method="lora+palt", task="triples", training=training)
    assert prefix.card.text_format["separator"] == "".join(f"<prompt {n}>" for n in range(10, 20))
    with attached(base.model, prefix):
        assert all(0 < likelihood < 1 for likelihood in likelihoods(base, EATS))


def graph_files(folder: Path) -> None:
    """A graph as KG-BERT's data sets come."""
    folder.mkdir()
    (folder / "entity2text.txt").write_text("".join(f"{n}_x\tthe {n}\n" for n in (*ANIMALS, *FOODS)))
    (folder / "relation2text.txt").write_text("eats_x\teats\n")
    (folder / "train.tsv").write_text("".join(f"{h}_x\teats_x\t{t}_x\n" for h, _, t in EATS[:3]))
    (folder / "test.tsv").write_text("hen_x\teats_x\tcorn_x\n")


class TestFiles:
    def test_a_graph_is_read_with_its_texts(self, tmp_path: Path) -> None:
        graph_files(tmp_path / "graph")
        found = antefix.read(tmp_path / "graph" / "train.tsv")
        assert [e.source for e in found][:2] == [
            Triples((("the cat", "eats", "the fish"),)), Triples((("the dog", "eats", "the bone"),))
        ]  # fmt: skip
        assert {e.targets for e in found} == {("true",)}
        (tmp_path / "graph" / "said.tsv").write_text("cat_x\teats_x\thay_x\t-1\ncat_x\teats_x\tfish_x\t1\n")
        assert [e.targets[0] for e in antefix.read(tmp_path / "graph" / "said.tsv")] == ["false", "true"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("cat_x\teats_x", "test.tsv, line 1: head, relation and tail are needed, with tabs between; there are 2"),
            ("cat_x\teats_x\tsun", "test.tsv, line 1: 'sun' has no text in entity2text.txt"),
            ("cat_x\tis\thay_x", "test.tsv, line 1: 'is' has no text in relation2text.txt"),
            ("cat_x\teats_x\thay_x\t0", "test.tsv, line 1: the fourth column is 1 or -1, this is '0'"),
        ],
    )
    def test_a_bad_line_is_named(self, line: str, message: str, tmp_path: Path) -> None:
        graph_files(tmp_path / "graph")
        (tmp_path / "graph" / "test.tsv").write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            antefix.read(tmp_path / "graph" / "test.tsv")

    def test_two_of_one_text_cannot_be_told_apart(self, tmp_path: Path) -> None:
        graph_files(tmp_path / "graph")
        (tmp_path / "graph" / "entity2text.txt").write_text("a\tthe cat\nb\tthe cat\n")
        with pytest.raises(DataError, match=r"entity2text.txt, line 2: 'b' has the text of 'a'"):
            antefix.read(tmp_path / "graph" / "train.tsv")

    def test_texts_may_come_from_windows_and_hold_any_sign(self, tmp_path: Path) -> None:
        graph_files(tmp_path / "graph")
        texts = tmp_path / "graph" / "entity2text.txt"
        texts.write_text("\ufeff" + texts.read_text().replace("the cat", "the\u2028cat"), encoding="utf-8")
        assert antefix.read(tmp_path / "graph" / "train.tsv")[0].source == Triples(
            (("the\u2028cat", "eats", "the fish"),)
        )
        texts.write_bytes("cat_x\tthe c\xe4t\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"entity2text.txt, line 1: not UTF-8 \(byte 0xe4\)"):
            antefix.read(tmp_path / "graph" / "train.tsv")

    def test_json_lines_say_the_same(self, tmp_path: Path) -> None:
        file = tmp_path / "graph.jsonl"
        rows = [{"triples": ["cat | eats | fish"]}, {"triples": [["dog", "eats", "bone"]]}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert true_triples(antefix.read(file)) == EATS[:2]
        file.write_text("".join(json.dumps({**row, "label": "false"}) + "\n" for row in rows))
        assert true_triples(antefix.read(file)) == []


def test_a_recipe_trains_and_a_command_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("bert")
    base.model.save_pretrained("encoder")
    base.tokenizer.save_pretrained("encoder")
    graph_files(tmp_path / "graph")
    (tmp_path / "graph.toml").write_text(
        'name = "food"\nbase = "encoder"\ntask = "triples"\nmethod = "palt"\n'
        "config = {begin = 2, middle = 1, end = 1}\n"
        '[data]\ntrain = "graph/train.tsv"\ndev = "graph/test.tsv"\n'
        '[training]\nmax_steps = 4\npairs_per_step = 16\nevaluations = 2\ndev_metric = "accuracy"\n'
    )
    dry = CliRunner().invoke(app, ["train", "graph.toml", "--dry-run", "--json", "training.max_steps=1"])
    run = CliRunner().invoke(app, ["train", "graph.toml"])
    assert run.exit_code == 0, run.output
    made = Prefix.load("bank/food").card.training
    assert made["pairs"] == made["sources"] == json.loads(dry.stdout)["pairs"], "of an epoch, not of all draws"
    words = ["links", "-p", "bank/food", "--test", "graph/test.tsv", "--dev", "graph/train.tsv", "--record", "--json"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    scores = json.loads(found.stdout)
    assert {"ranked", "mr", "mrr", "hits_at_1", "hits_at_3", "hits_at_10", "threshold", "accuracy"} <= scores.keys()
    assert scores["ranked"] == 1
    assert Prefix.load("bank/food").card.scores["links"] == scores
    said = CliRunner().invoke(app, ["generate", "the cat : eats : the fish", "-p", "bank/food"])
    assert said.stdout.strip() in ("true", "false")
