"""Many prefixes trained together: each becomes what it becomes alone, and a run goes on from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_base
from torch import Tensor

from antefix.attention.hook import routed
from antefix.bank import Bank
from antefix.base import Base
from antefix.batches.form import batch_of
from antefix.batches.head import pair_losses
from antefix.data import Example, Table
from antefix.data.plan import all_units
from antefix.errors import TrainingError
from antefix.prefix import Prefix
from antefix.training import many as many_module
from antefix.training.identity import Identity, identity_of
from antefix.training.many import ManyReport, train_many
from antefix.training.many_report import report_of
from antefix.training.many_run import ManyPlan, plan_many, work_of
from antefix.training.prepared import prepare_recipe
from antefix.training.recipe import Recipe
from antefix.training.run import train
from antefix.training.user_learner import UserLearner
from antefix.training.users import User, Users, user_prefix_name

SHARED_METHODS: dict[str, dict[str, Any]] = {
    "prefix_tuning": {"num_virtual_tokens": 3},
    "infix": {"num_virtual_tokens": 3},
    "apt": {"num_virtual_tokens": 3},
    "hierarchical_blocking": {"num_virtual_tokens": 3, "target_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "llama_adapter": {"num_virtual_tokens": 3},
    "prefix_memory": {},
    "soft_infix": {"num_virtual_tokens": 2},
    "lora": {"rank": 2},
    "ia3": {},
    "adapter": {"width": 3},
    "prefix_tuning+lora": {"lora": {"rank": 2}},
}


def user(name: str, count: int, *, with_dev: bool = True) -> User:
    def example(n: int) -> Example:
        table = Table((("name", f"{name} {n}"), ("price", f"{n * len(name)}")))
        return Example(source=table, targets=(f"{name} asks {n * len(name)}.", f"For {n}: {name}, {name}."))

    dev = tuple(example(n) for n in range(count, count + 2)) if with_dev else ()
    return User(
        name=user_prefix_name("t", (name,)), by={"name": name}, train=tuple(example(n) for n in range(count)), dev=dev
    )


USERS = [user("Inn", 3), user("Fern Hill", 5), user("A", 4, with_dev=False), user("Bridge", 2)]


def recipe(folder: Path, method: str = "prefix_tuning", **changes: Any) -> Recipe:
    training = {
        "max_steps": 5, "pairs_per_step": 3, "evaluations": 2, "tokens_per_batch": 250, "checkpoint_seconds": 0,
        "learning_rate": 0.02,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "t", "base": "tiny", "dtype": "float32", "method": method, "bank": str(folder / "bank"),
            "run": str(folder / "run"), "config": changes.pop("config", SHARED_METHODS.get(method, {})),
            "data": {"train": "none"}, "training": training | changes,
        }
    )  # fmt: skip


def many(
    base: Base, made: Recipe, users: Sequence[User] = USERS, *, overwrite: bool = False,
    tokens_at_work: int | None = None,
    watch: Callable[[ManyReport], None] = lambda report: None, stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[ManyPlan, dict[str, str]]:  # fmt: skip
    """Train what is to be trained; the plan, and who failed."""
    plan = plan_many(made, Users(list(users), [], {}), overwrite=overwrite)
    failed: dict[str, str] = {}

    def fail(one: User, reason: str) -> None:
        failed[one.name] = reason

    work = work_of(plan, plan.waiting, base, fail, tokens_at_work=tokens_at_work)
    train_many(base, work, watch=watch, stop_requested=stop_requested)
    return plan, failed


def tensors(made: Recipe, one: User) -> dict[str, Tensor]:
    return Prefix.load(Path(made.bank) / one.name).tensors


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", SHARED_METHODS)
def test_nobody_learns_from_the_others(method: str, tmp_path: Path) -> None:
    base = tiny_base("llama")
    together = recipe(tmp_path / "together", method)
    many(base, together)
    for one in USERS[:2]:
        alone = recipe(tmp_path / one.name, method)
        many(base, alone, [one])
        assert_close(tensors(together, one), tensors(alone, one))
        assert Prefix.load(Path(together.bank) / one.name).card.training["steps"] == 5
    kept = [tensors(together, one) for one in USERS[:2]]
    assert any(not torch.allclose(t, kept[1][n], atol=1e-3) for n, t in kept[0].items()), "all learned the same"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "bart", "t5"])
@pytest.mark.parametrize("packed", [None, False])
def test_a_prefix_among_others_is_what_antefix_train_makes_of_its_data(
    architecture: str, packed: bool | None, tmp_path: Path
) -> None:
    base = tiny_base(architecture)
    made = recipe(tmp_path, packed=packed)
    many(base, made)
    for one in USERS:
        alone = train(base, one.train, dev=one.dev, training=made.training, **SHARED_METHODS["prefix_tuning"])
        kept = Prefix.load(Path(made.bank) / one.name)
        assert_close(kept.tensors, alone.tensors)
        assert [d["step"] for d in kept.card.scores["dev"]] == [d["step"] for d in alone.card.scores["dev"]]
        for mine, other in zip(kept.card.scores["dev"], alone.card.scores["dev"], strict=True):
            assert mine["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-4)
        assert kept.card.training["kept_step"] == alone.card.training["kept_step"]


def test_a_prefix_that_stops_early_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    base = tiny_base("llama")
    made = recipe(tmp_path, dev_metric="bleu", patience=1, evaluations=8, max_steps=8)
    users = [USERS[0], USERS[2], USERS[3]]
    many(base, made, users)
    steps = [Prefix.load(Path(made.bank) / one.name).card.training["steps"] for one in users]
    assert steps == [2, 8, 2], "BLEU stays 0; who has no dev set has nothing to stop by"
    alone = train(base, USERS[0].train, dev=USERS[0].dev, training=made.training, **SHARED_METHODS["prefix_tuning"])
    assert alone.card.training["steps"] == 2


def test_few_are_at_work_at_once_and_all_are_done(tmp_path: Path) -> None:
    base, seen = tiny_base("llama"), []
    made = recipe(tmp_path)
    many(base, made, tokens_at_work=1, watch=seen.append)
    assert {report.num_at_work for report in seen} <= {0, 1}
    assert len(Bank(made.bank)) == len(USERS)
    more: list[ManyReport] = []
    other = recipe(tmp_path / "other")
    many(base, other, watch=more.append)
    assert max(report.num_at_work for report in more) == len(USERS)
    assert len(more) < len(seen), "passes are fuller"
    for one in USERS:
        assert_close(tensors(made, one), tensors(other, one))


def test_no_forward_pass_is_larger_than_the_token_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from antefix.training import mixing

    fed: list[int] = []
    batch_of = mixing.batch_of

    def noted(*args: Any) -> Any:
        batch = batch_of(*args)
        fed.append(batch.num_tokens)
        return batch

    monkeypatch.setattr(mixing, "batch_of", noted)
    many(tiny_base("llama"), recipe(tmp_path, tokens_per_batch=400))
    assert max(fed) <= 400
    assert max(fed) > 250, "and one is nearly full"


def stop_after(turns: int) -> Callable[[], bool]:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= turns


def test_a_run_that_was_stopped_ends_with_the_same_tensors(tmp_path: Path) -> None:
    base = tiny_base("llama")
    whole, made = recipe(tmp_path / "whole"), recipe(tmp_path / "stopped")
    at_once: list[ManyReport] = []
    in_parts: list[ManyReport] = []
    many(base, whole, watch=at_once.append)
    for turns in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            many(base, made, watch=in_parts.append, stop_requested=stop_after(turns))
    assert list((tmp_path / "stopped" / "run" / "users").iterdir()), "those in the middle have checkpoints"
    many(base, made, watch=in_parts.append)
    assert len(in_parts) <= len(at_once) + 3, "no turn is done twice"
    for one in USERS:
        assert_close(tensors(made, one), tensors(whole, one))
        assert Prefix.load(Path(made.bank) / one.name).card.training["steps"] == 5
    assert not list((tmp_path / "stopped" / "run" / "users").iterdir())


def test_only_who_changed_is_trained_again(tmp_path: Path) -> None:
    base, made = tiny_base("llama"), recipe(tmp_path)
    many(base, made)
    before = {one.name: (Path(made.bank) / one.name / "card.json").stat().st_mtime_ns for one in USERS}
    plan, _ = many(base, made)
    assert plan.waiting == ()
    changed = [*USERS[:3], user("Bridge", 3)]
    plan, _ = many(base, made, changed)
    assert [one.by["name"] for one in plan.waiting] == ["Bridge"]
    after = {one.name: (Path(made.bank) / one.name / "card.json").stat().st_mtime_ns for one in USERS}
    assert [name for name in before if before[name] != after[name]] == [USERS[3].name]


def test_what_was_trained_on_other_data_is_not_reported_as_done(tmp_path: Path) -> None:
    base, made = tiny_base("llama"), recipe(tmp_path)
    many(base, made)
    plan = plan_many(made, Users([*USERS[:3], user("Bridge", 3)], [], {}))
    assert [row.outcome for row in report_of(plan, {}).rows] == ["unchanged", "unchanged", "unchanged", "waiting"]


def test_what_is_another_recipes_or_nobodys_is_not_replaced_unasked(tmp_path: Path) -> None:
    base, made = tiny_base("llama"), recipe(tmp_path)
    many(base, made, USERS[:1])
    other = recipe(tmp_path, learning_rate=0.01)
    with pytest.raises(TrainingError, match=r"t\.Inn was trained by another recipe: .* --overwrite"):
        many(base, other, USERS[:1])
    plan, _ = many(base, other, USERS[:1], overwrite=True)
    assert len(plan.waiting) == 1
    kept = Prefix.load(Path(made.bank) / USERS[0].name)
    bare = {name: value for name, value in kept.card.training.items() if name != "many"}
    Prefix(kept.tensors, kept.card.model_copy(update={"training": bare})).save(Path(made.bank) / USERS[1].name)
    with pytest.raises(TrainingError, match=r"t\.Fern_Hill was not trained for this user"):
        many(base, made, USERS[1:2])


def test_the_card_says_whose_it_is_and_what_the_base_scores(tmp_path: Path) -> None:
    base, made = tiny_base("llama"), recipe(tmp_path)
    plan, _ = many(base, made)
    card = Prefix.load(Path(made.bank) / "t.Fern_Hill").card
    assert Identity.of_card(card) == identity_of(USERS[1], plan.digest)
    assert card.tags == ("name=Fern Hill",)
    data = prepare_recipe(plan.recipe, (USERS[1].train, USERS[1].dev), base).dev_set
    with routed(base.model):
        losses = pair_losses(base.model, batch_of("padded", data, all_units(data), base.model))
    tokens = sum(len(t) for e in data.examples for t in e.targets)
    assert card.scores["base"]["dev_loss"] == pytest.approx(float(losses.sum()) / tokens, rel=1e-5)


def test_a_user_whose_loss_is_no_number_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's networks meet every token of a batch: one that is no number would spoil all."""
    base = tiny_base("llama")
    made, healthy = recipe(tmp_path / "ill", "lora"), recipe(tmp_path / "healthy", "lora")
    begin = UserLearner._next_step

    def spoilt(self: UserLearner) -> None:
        begin(self)
        if self.user.name == "t.Inn" and self.steps_done == 2:
            with torch.no_grad():
                next(iter(self.module.parameters())).fill_(math.nan)

    monkeypatch.setattr(UserLearner, "_next_step", spoilt)
    _, failed = many(base, made)
    assert list(failed) == ["t.Inn"]
    assert failed["t.Inn"].startswith("step 3: the loss is nan; lower learning_rate (now 0.02)")
    monkeypatch.setattr(UserLearner, "_next_step", begin)
    many(base, healthy)
    for one in USERS[1:]:
        assert_close(tensors(made, one), tensors(healthy, one))


def test_a_user_whose_dev_score_is_no_number_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = many_module._dev_losses

    def spoilt(base: Base, attachment: Any, learners: Any, *rest: Any) -> Any:
        found = measured(base, attachment, learners, *rest)
        ill = {one: math.nan for one in found if one.user.name == "t.Inn" and one.needs == "dev_scores"}
        return found | ill

    monkeypatch.setattr(many_module, "_dev_losses", spoilt)
    made = recipe(tmp_path, "lora")
    _, failed = many(tiny_base("llama"), made)
    assert list(failed) == ["t.Inn"]
    assert "its dev loss is nan; lower learning_rate" in failed["t.Inn"]
    assert all(tensors(made, one) for one in USERS[1:])


def test_data_that_do_not_fit_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    long = user("Long" * 200, 2)
    plan, failed = many(tiny_base("llama"), recipe(tmp_path), [long, USERS[0], USERS[2]])
    assert list(failed) == [long.name]
    assert "do not fit into the base's context" in failed[long.name]
    report = report_of(plan, failed)
    assert [row.name for row in report.worst] == [long.name, USERS[0].name]
    assert report.worst[0].reasons[0].startswith("failed: ")
    assert [row.outcome for row in report.rows] == ["failed", "trained", "trained"]
    assert report.rows[2].reasons == ("no dev set",)


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("full", {}, "changes the base's own weights"),
        ("top_layers", {}, "changes the base's own weights"),
        ("bbt", {}, "is searched without gradients"),
        ("special_tokens", {"config": {"tokens": ["[X"]}}, "learns new tokens"),
        ("p_tuning_v2", {"config": {"dropout": 0.1}}, "has dropout"),
        ("infix", {"keep_source_states": True}, "keeps the sources of one prefix"),
    ],
)
def test_what_cannot_share_a_forward_pass_is_refused(
    method: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=f"{reason}.*antefix train"):
        many(tiny_base("llama"), recipe(tmp_path, method, **changes))


def test_the_recipes_metric_chooses_each_ones_best_step(tmp_path: Path) -> None:
    base = tiny_base("llama")
    made = recipe(tmp_path, dev_metric="bleu")
    many(base, made, USERS[:2])
    for one in USERS[:2]:
        alone = train(base, one.train, dev=one.dev, training=made.training, **SHARED_METHODS["prefix_tuning"])
        dev = Prefix.load(Path(made.bank) / one.name).card.scores["dev"]
        assert [d["dev_bleu"] for d in dev] == [d["dev_bleu"] for d in alone.card.scores["dev"]]


def test_names_can_be_read_back_and_long_ones_stay_apart() -> None:
    assert user_prefix_name("menus", ("Fern Hill", "£20-25")) == "menus.Fern_Hill.__a3_20-25"
    assert len({user_prefix_name("m", (v,)) for v in ("a b", "a_b", "a.b", "a-b", "A b")}) == 5
    one, other = (user_prefix_name("m", ("x" * 150 + end,)) for end in "ab")
    assert len(one) == len(other) == 100
    assert one != other
