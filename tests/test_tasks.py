"""Tasks that label: from files to heads, from prefixes to labels and their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import DECODER_ONLY, ENCODER_ONLY, METHOD_CONFIGS, tiny_base, tiny_method
from transformers import BertModel, BertTokenizer
from typer.testing import CliRunner

import antefix
from antefix.attach import attached
from antefix.base import Base
from antefix.cli import app
from antefix.data.encode import Limits
from antefix.data.example import Words
from antefix.data.linearise import TextFormat
from antefix.errors import DataError, GenerationError, PrefixError, PrefixFileError, TrainingError
from antefix.hidden_states import states_and_logits
from antefix.labels import label, scores_each
from antefix.metrics import METRICS, score
from antefix.metrics.span_f1 import spans
from antefix.prefix import Prefix
from antefix.tasks import TASKS, KeptTask, TaskName, TextTask
from antefix.tasks.classification import ClassificationTask
from antefix.tasks.tagging import TaggingTask
from antefix.training.recipe import TrainingRecipe

BASES = ("llama", "gpt2", "opt", *ENCODER_ONLY)
ANIMALS = [antefix.Example(source=f"{noise} {kind}", targets=("pet" if kind == "cat" else "wild",))
           for kind in ("cat", "elk") for noise in ("a", "the", "one", "my", "no", "her")]  # fmt: skip
TAGGED = [
    antefix.Example(source=Words((a, b, c)), targets=(" ".join([first, "O", last]),))
    for a, first in (("zz", "B-x"), ("ab", "O")) for b in ("m", "n", "o") for c, last in (("qq", "B-y"), ("cd", "O"))
]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_what_its_line_says(name: TaskName) -> None:
    task = TASKS[name]
    assert task.model_fields["name"].default == name
    assert task.metrics
    assert set(task.metrics) <= set(METRICS)
    assert task.writes_text == (name == "text_generation")
    assert task in get_args(get_args(KeptTask)[0]), "cards keep it"


def test_cards_of_texts_have_no_task_in_their_file(tmp_path: Path) -> None:
    base = tiny_base("llama")
    texts = [antefix.Example(source="a", targets=("b",))] * 2
    kept = antefix.train(base, texts, dev=texts, training=TrainingRecipe(max_steps=1)).save(tmp_path / "kept")
    assert json.loads((kept / "card.json").read_text())["task"] is None
    assert Prefix.load(kept).card.task == TextTask()


def test_what_writes_texts_labels_nothing() -> None:
    base = tiny_base("llama")
    for task in (None, TextTask()):
        message = "attach prefixes that were trained to classify, to tag or to rank"
        with attached(base.model, tiny_method(base)), pytest.raises(GenerationError, match=message):
            label(base, ANIMALS, task=task)


def trained(base: Base, task: str, examples: list[antefix.Example], **config: object) -> Prefix:
    training = TrainingRecipe(
        max_steps=60, pairs_per_step=12, evaluations=3, learning_rate=0.03, schedule="constant", warmup_steps=0
    )
    given = {"num_virtual_tokens": 4, "initial_scale": 0.5, "dropout": 0.0, **config}
    return antefix.train(base, examples, task=task, dev=examples, training=training, method="p_tuning_v2", **given)


@pytest.mark.parametrize("name", BASES)
def test_texts_are_classified(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    prefix = Prefix.load(trained(base, "classification", ANIMALS).save(tmp_path / "kept"))
    assert prefix.card.task == ClassificationTask(labels=("pet", "wild"))
    assert {"head.weight", "head.bias"} <= prefix.tensors.keys()
    with attached(base.model, prefix):
        found = label(base, ANIMALS)
    assert score([e.targets for e in ANIMALS], found, ["accuracy"])["accuracy"] == 1.0


@pytest.mark.parametrize("name", BASES)
def test_words_are_tagged(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    prefix = Prefix.load(trained(base, "tagging", TAGGED).save(tmp_path / "kept"))
    with attached(base.model, prefix):
        found = label(base, TAGGED)
    scores = score([e.targets for e in TAGGED], found, ["span_f1", "word_accuracy"])
    assert scores["word_accuracy"] > 0.9
    assert scores["span_f1"] > 0.8


def test_rows_carry_prefixes_of_their_own(tmp_path: Path) -> None:
    base = tiny_base("bert")
    swapped = [antefix.Example(source=e.source, targets=("wild" if e.targets[0] == "pet" else "pet",)) for e in ANIMALS]
    first, second = (trained(base, "classification", some) for some in (ANIMALS, swapped))
    with attached(base.model, first, second) as attachment:
        attachment.rows = [n % 2 for n in range(len(ANIMALS))]
        found = label(base, ANIMALS, batch_size=5)
        assert attachment.rows.tolist() == [n % 2 for n in range(len(ANIMALS))]
    wanted = [(ANIMALS, swapped)[n % 2][n].targets[0] for n in range(len(ANIMALS))]
    assert found == wanted


@pytest.mark.parametrize("method", ["apt", "prompt_tuning", "prefix_memory", "llama_adapter", "sparse_prefix"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_every_kind_of_method_classifies(name: str, method: str) -> None:
    base = tiny_base(name)
    training = TrainingRecipe(max_steps=3, pairs_per_step=4, evaluations=1)
    prefix = antefix.train(
        base, ANIMALS, task="classification", training=training, method=method, **METHOD_CONFIGS[method]
    )
    with attached(base.model, prefix):
        assert set(label(base, ANIMALS)) <= {"pet", "wild"}


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_what_pools_is_not_trained(method: str) -> None:
    """Labels are read off the first token's state, before an encoder's own pooler."""
    whole = tiny_base("bert")
    base = Base(BertModel(whole.model.config).eval(), whole.tokenizer, "tiny-bert-model")
    training = TrainingRecipe(max_steps=2, evaluations=1)
    prefix = antefix.train(base, ANIMALS, task="classification", method=method, training=training)
    assert any("pooler" in name for name, _ in base.model.named_parameters())
    assert not any("pooler" in name for name in prefix.tensors)


@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_ONLY])
def test_states_and_logits_are_those_of_the_whole_model(name: str) -> None:
    base = tiny_base(name)
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states, logits = states_and_logits(base.model, {"input_ids": ids}, torch.tensor([5, 2]))
        wanted = base.model(ids, output_hidden_states=True)
    torch.testing.assert_close(states, wanted.hidden_states[-1])
    if name in DECODER_ONLY:
        torch.testing.assert_close(logits, wanted.logits[[0, 1], [5, 2]])


def test_places_are_first_tokens_in_encoders_and_last_ones_in_decoders() -> None:
    """One token a byte: 'ab m cd' is seven tokens, of which two are spaces."""
    tokenizer = tiny_base("llama").tokenizer
    task = TaggingTask.of(TAGGED)
    source = Words(("ab", "m", "cd"))
    for for_encoder, wanted in ((True, [0, 3, 5]), (False, [1, 3, 6])):
        ids, places, _ = task.encoder(TextFormat(linearise="words"), tokenizer, for_encoder=for_encoder)(source)
        assert len(ids) == 7
        assert places == wanted
    task = ClassificationTask.of(ANIMALS)
    ids, places, _ = task.encoder(TextFormat(), tokenizer, for_encoder=False)("a cat")
    assert places == [len(ids) - 1]


def test_a_word_of_which_no_token_is_made_has_a_tag() -> None:
    """WordPiece drops control signs; what stands for such a word is the unknown token."""
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"))})
    encode = TaggingTask.of(TAGGED).encoder(TextFormat(linearise="words"), tokenizer, for_encoder=True)
    ids, places, _ = encode(Words(("a", "\u200b", "b")))
    assert ids == [2, 4, 1, 5, 3]
    assert places == [1, 2, 3]
    wrong = antefix.Example(source=Words(("a", "b", "a")), targets=("O O",))
    task = TaggingTask.of(TAGGED)
    with pytest.raises(DataError, match="2 tags for 3 words: one a word is needed"):
        task.encode([wrong], TextFormat(linearise="words"), tokenizer, Limits(context=None), for_encoder=True)


def test_a_text_that_does_not_fit_is_told() -> None:
    base = tiny_base("bert")
    prefix = trained(base, "classification", ANIMALS)
    with attached(base.model, prefix), pytest.raises(GenerationError, match="source 2 has .* tokens, more than"):
        label(base, ["a cat", "a cat " * 500])


def test_a_row_without_a_prefix_has_no_label() -> None:
    base = tiny_base("bert")
    prefix = trained(base, "classification", ANIMALS)
    with attached(base.model, prefix, rows=[0, -1]), pytest.raises(GenerationError, match="source 2 has no prefix"):
        label(base, ["a cat", "a elk"])


def test_conll_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "names.conll"
    file.write_text("Fern\tx\tB-person\nlives O\n\n\nKent B-place\n", encoding="utf-8")
    found = antefix.read(file)
    assert [(e.source, e.targets, e.where.rpartition(" ")[2]) for e in found] == [
        (Words(("Fern", "lives")), ("B-person O",), "1"), (Words(("Kent",)), ("B-place",), "5")
    ]  # fmt: skip
    file.write_text("Fern\n", encoding="utf-8")
    with pytest.raises(DataError, match="names.conll, line 1: a word and its tag are needed"):
        antefix.read(file)


def test_spans_are_conllevals() -> None:
    assert spans(["B-a", "I-a", "O", "I-b", "I-b", "B-b", "I-a"]) == {
        (0, 2, "a"),
        (3, 5, "b"),
        (5, 6, "b"),
        (6, 7, "a"),
    }
    assert score([["B-a I-a O B-b"]], ["B-a O O B-b"], ["span_f1"])["span_f1"] == pytest.approx(0.5)
    assert score([["O O"]], ["O O"], ["span_f1"])["span_f1"] == 0.0


def test_what_is_wrong_is_said() -> None:
    base = tiny_base("bert")
    task = ClassificationTask.of(ANIMALS)
    wrong = [antefix.Example(source="a", targets=("tame",), where="x.csv, line 3")]
    with pytest.raises(DataError, match="x.csv, line 3: the label 'tame' is not in the training data \\(pet, wild\\)"):
        task.encode(wrong, TextFormat(), base.tokenizer, Limits(context=None), for_encoder=True)
    with pytest.raises(DataError, match="needs at least two different labels"):
        trained(base, "classification", ANIMALS[:3])
    with pytest.raises(DataError, match="tagging needs words with tags"):
        trained(base, "tagging", ANIMALS)
    with pytest.raises(TrainingError, match="needs an encoder or a decoder"):
        trained(tiny_base("bart"), "classification", ANIMALS)
    with pytest.raises(GenerationError, match="attach a prefix that was trained to classify"):
        label(base, ANIMALS)


def test_words_that_are_tagged_stand_alone() -> None:
    base, task = tiny_base("bert"), TaggingTask.of(TAGGED)
    limits = Limits(context=2)
    with pytest.raises(DataError, match=r"7 tokens do not fit into the base's context of 2; split the text$"):
        task.encode([TAGGED[0]], TextFormat(linearise="words"), base.tokenizer, limits, for_encoder=True)
    for given in ({"instruction": "Tag: "}, {"before_source": " "}, {"max_source_tokens": 2}, {"chat": True}):
        text_format = TextFormat.from_dict({"linearise": "words", **given})
        message = f"tagging reads words as they stand, '{next(iter(given))}' would do nothing: leave it out"
        with pytest.raises(DataError, match=message):
            task.encode(TAGGED, text_format, base.tokenizer, Limits(context=None), for_encoder=True)


def test_new_tokens_tag_no_words() -> None:
    with pytest.raises(TrainingError, match=r"p_tuning_v2\+special_tokens has new tokens, and tagging reads words"):
        antefix.train(
            tiny_base("llama"), TAGGED, task="tagging", method="p_tuning_v2+special_tokens",
            special_tokens={"tokens": ["ab"]},
        )  # fmt: skip


def test_scales_start_from_a_prefix_that_labels(tmp_path: Path) -> None:
    base, training = tiny_base("bert"), TrainingRecipe(max_steps=1, evaluations=1)
    first = antefix.train(base, ANIMALS, task="classification", training=training, method="ia3")
    first.save(tmp_path / "first")
    again = antefix.train(
        base, ANIMALS, task="classification", training=training, method="ia3", initial_prefix=str(tmp_path / "first")
    )
    assert again.tensors.keys() == first.tensors.keys()


def test_a_broken_head_is_refused(tmp_path: Path) -> None:
    base = tiny_base("bert")
    prefix = trained(base, "classification", ANIMALS)
    folder = prefix.save(tmp_path / "kept")
    card = json.loads((folder / "card.json").read_text())
    card["task"]["name"] = "guessing"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(PrefixFileError, match="task: Input tag 'guessing'"):
        Prefix.load(folder)
    del prefix.tensors["head.bias"]
    with pytest.raises(antefix.AntefixError, match="has no head for its 2 labels"):
        prefix.module(base.model)


def test_from_a_file_to_scored_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("bert")
    base.model.save_pretrained("tiny")
    base.tokenizer.save_pretrained("tiny")
    rows = "".join(f"{e.source},{e.targets[0]}\n" for e in ANIMALS)
    Path("animals.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    Path("animals.toml").write_text(
        'name = "animals"\nbase = "tiny"\ndtype = "float32"\ntask = "classification"\nmethod = "p_tuning_v2"\n'
        '[config]\nnum_virtual_tokens = 4\n[data]\ntrain = "animals.csv"\n'
        '[training]\nmax_steps = 4\ndev_metric = "accuracy"\nevaluations = 2\n',
        encoding="utf-8",
    )
    runner = CliRunner()
    assert runner.invoke(app, ["train", "animals.toml"], catch_exceptions=False).exit_code == 0
    one = runner.invoke(app, ["generate", "a cat", "--prefix", "bank/animals"], catch_exceptions=False)
    assert one.stdout.strip() in ("pet", "wild")
    command = ["generate", "--prefix", "bank/animals", "--input", "animals.csv", "--output", "labels.jsonl"]
    assert runner.invoke(app, command, catch_exceptions=False).exit_code == 0
    assert len(Path("labels.jsonl").read_text(encoding="utf-8").splitlines()) == len(ANIMALS)


def with_words(name: str) -> tuple[Base, Prefix]:
    base = tiny_base(name)
    training = TrainingRecipe(
        max_steps=60, pairs_per_step=12, evaluations=3, learning_rate=0.03, schedule="constant", warmup_steps=0
    )
    return base, antefix.train(
        base, ANIMALS, task="classification", words={"pet": "home", "wild": "out"}, dev=ANIMALS, training=training,
        method="p_tuning_v2", num_virtual_tokens=4, initial_scale=0.5, dropout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels_can_be_words_of_the_base(name: str, tmp_path: Path) -> None:
    """A label's score is the logit of its word behind the text, and nothing is learned for it."""
    base, prefix = with_words(name)
    prefix = Prefix.load(prefix.save(tmp_path / "kept"))
    assert isinstance(prefix.card.task, ClassificationTask)
    ids = base.tokenizer("ho")["input_ids"][0], base.tokenizer("ou")["input_ids"][0]
    assert prefix.card.task.word_ids == ids
    assert not any(name.startswith("head") for name in prefix.tensors)
    with attached(base.model, prefix), torch.no_grad():
        found = label(base, ANIMALS)
        encode = prefix.card.task.encoder(
            TextFormat.from_dict(prefix.card.text_format), base.tokenizer, for_encoder=False
        )
        logits = base.model(torch.tensor([encode("a cat")[0]])).logits[0, -1, list(ids)]
        ((_, _, scores),) = scores_each(base, ["a cat"])
        torch.testing.assert_close(scores[0], logits, rtol=1e-4, atol=1e-4)
    assert score([e.targets for e in ANIMALS], found, ["accuracy"])["accuracy"] == 1.0


def test_rows_with_words_or_heads_and_unlike_new_tokens_share_a_batch() -> None:
    base, home = tiny_base("llama"), {"pet": "home", "wild": "out"}
    training = TrainingRecipe(max_steps=2, evaluations=1)
    prefixes = [
        antefix.train(base, ANIMALS, task="classification", method="prefix_tuning+special_tokens", training=training,
                      words=words, special_tokens={"tokens": tokens})
        for words, tokens in ((home, ["ab"]), (None, ["ca", "th"]), (home, ["e "]))
    ]  # fmt: skip
    alone = []
    for n, prefix in enumerate(prefixes):
        with attached(base.model, prefix):
            alone += [scores for _, _, scores in scores_each(base, [ANIMALS[n].source])]
    with attached(base.model, *prefixes, rows=[0, 1, 2]):
        together = {n: scores for n, _, scores in scores_each(base, [e.source for e in ANIMALS[:3]])}
    for n, scores in enumerate(alone):
        torch.testing.assert_close(together[n], scores, rtol=1e-4, atol=1e-4)


def test_words_that_cannot_stand_for_labels_are_told() -> None:
    task = ClassificationTask.of(ANIMALS)
    tokenizer = tiny_base("llama").tokenizer
    for words, message in [
        ({"pet": "a"}, "the labels are pet, wild, words are given for pet"),
        ({"pet": "home", "wild": "hut"}, "'hut' and 'home' begin with the same token"),
        ({"pet": "", "wild": "hut"}, "'' has no tokens"),
    ]:
        with pytest.raises(DataError, match=message):
            task.with_words(words, tokenizer)
    with pytest.raises(DataError, match="words for labels are for classification, not for tagging"):
        TaggingTask.of(TAGGED).with_words({}, tokenizer)
    with pytest.raises(PrefixError, match="words for labels need a causal base with an output head"):
        with_words("bert")
