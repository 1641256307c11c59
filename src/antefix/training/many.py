"""Many prefixes trained together on one base, each as it would be alone.

Several users' rows share a forward pass: each row carries its user's prefix, and a row sees no other row. The gradient
of the sum of the users' losses, each normalised by its own pairs, is for each prefix its own. Steps are small, and a
pass holds as many of them as fit; so passes are fewer and fuller than with one user after another. Dev sets share
passes in the same way. Who is done leaves, and the next one comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from antefix.at_work import BARE
from antefix.attach import attached
from antefix.attachment import Attachment
from antefix.base import Base
from antefix.errors import TrainingError
from antefix.generation import generate_each
from antefix.metrics import score
from antefix.training.mixing import Share, passes
from antefix.training.recipe import TrainingRecipe
from antefix.training.recompute import recomputing
from antefix.training.team import Team, Work
from antefix.training.user_learner import UserLearner

_LATEST_STEPS = 50

Seats = dict[UserLearner, int]
"""Which of the attached prefixes is whose."""


@dataclass(frozen=True, slots=True)
class ManyReport:
    """What a watcher sees after every turn. Watching changes nothing."""

    num_done: int
    """Users that are done, failed ones among them."""
    num_users: int
    num_at_work: int
    loss: float
    """Mean of the latest steps of all users; 0 before the first."""
    steps_per_second: float
    """Optimiser steps of all users together, since the start."""
    seconds_left: float


def train_many(
    base: Base,
    work: Work,
    *,
    watch: Callable[[ManyReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Train all users of `work`, whose recipes differ in nothing.

    What is wrong with one user alone (data that do not fit, a loss that is no number) is told, and the others go on.
    stop_requested: asked after every turn; True saves checkpoints of all at work and raises KeyboardInterrupt.
    """
    team = Team(work)
    losses: deque[float] = deque(maxlen=_LATEST_STEPS)
    started, num_steps = time.monotonic(), 0
    while team.admit():
        recipe = team.at_work[0].prepared.training
        modules = [learner.module for learner in team.at_work]
        recompute = recomputing(base.model) if recipe.activation_checkpointing else nullcontext()
        with attached(base.model, *modules) as attachment, recompute:
            seats = {learner: n for n, learner in enumerate(team.at_work)}
            while team.is_complete and len(team.at_work) == len(modules):
                made = _turn(base, team, attachment, seats, recipe)
                losses.extend(made)
                num_steps += len(made)
                passed = time.monotonic() - started
                watch(
                    ManyReport(
                        num_done=team.num_done,
                        num_users=team.num_users,
                        num_at_work=len(team.at_work),
                        loss=sum(losses) / max(len(losses), 1),
                        steps_per_second=num_steps / passed,
                        seconds_left=team.num_steps_left * passed / max(num_steps, 1),
                    )
                )
                stop = stop_requested()
                team.save(at_once=stop)
                if stop:
                    raise KeyboardInterrupt
        team.let_go()


def _turn(base: Base, team: Team, attachment: Attachment, seats: Seats, recipe: TrainingRecipe) -> list[float]:
    """What is to be done next; returns the losses of the steps that were made.

    Dev sets wait for one another until they fill a pass, or nobody can make a step without them.
    """
    budget = recipe.tokens_per_batch
    due = [*team.those_who_need("dev_scores"), *team.those_who_need("base_loss")]
    tokens = sum(learner.dev_extent.num_tokens for learner in due)
    if due and (tokens >= budget or not team.those_who_need("step")):
        for learner, problem in _evaluate(base, attachment, due, seats, recipe).items():
            team.dismiss(learner, problem)
        return []
    chosen = team.next_to_step(budget)
    problems = _gradients(base, attachment, chosen, seats, recipe)
    if problems and len(chosen) > 1:  # a value that is no number may have spoilt the others' gradients as well
        made = []
        for learner in chosen:
            alone = _gradients(base, attachment, [learner], seats, recipe)
            made += _steps(team, [learner], alone)
        return made
    return _steps(team, chosen, problems)


def _steps(team: Team, learners: Sequence[UserLearner], problems: dict[UserLearner, str]) -> list[float]:
    made = []
    for learner in learners:
        if learner in problems:
            team.dismiss(learner, problems[learner])
        else:
            made.append(learner.step())
    return made


def _gradients(
    base: Base,
    attachment: Attachment,
    learners: Sequence[UserLearner],
    seats: Seats,
    recipe: TrainingRecipe,
) -> dict[UserLearner, str]:
    """The gradients of these users' next steps; whose are no numbers, and why."""
    for learner in learners:
        learner.clear()
    by_seat = {seats[learner]: learner for learner in learners}
    shares = [Share(seat, seat, one.prepared.train_set, one.units) for seat, one in by_seat.items()]
    form = learners[0].form
    for mixed in passes(base.model, attachment, shares, form, recipe.tokens_per_batch, recipe.label_smoothing):
        losses = [by_seat[seat].step_loss(mixed.of(seat)) for seat in mixed.owners]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    return {learner: str(problem) for learner in learners if (problem := learner.check_gradients()) is not None}


@torch.no_grad()
def _evaluate(
    base: Base,
    attachment: Attachment,
    learners: Sequence[UserLearner],
    seats: Seats,
    recipe: TrainingRecipe,
) -> dict[UserLearner, str]:
    """Fresh dev scores, or the dev loss of the bare base, for those who need the one or the other.

    Whose scores are no numbers, and why.
    """
    problems: dict[UserLearner, str] = {}
    with_prefix = [learner for learner in learners if learner.needs == "dev_scores"]
    for learner in learners:
        learner.module.eval()
    losses = _dev_losses(base, attachment, learners, seats, recipe)
    further = {} if recipe.dev_metric == "loss" else _written_scores(base, attachment, with_prefix, seats, recipe)
    for learner, loss in losses.items():
        if learner in with_prefix:
            try:
                learner.learner.note({"dev_loss": loss, **further.get(learner, {})})
            except TrainingError as error:
                problems[learner] = str(error)
        else:
            learner.base_loss = loss
        learner.module.train()
    return problems


def _dev_losses(
    base: Base,
    attachment: Attachment,
    learners: Sequence[UserLearner],
    seats: Seats,
    recipe: TrainingRecipe,
) -> dict[UserLearner, float]:
    """Of each with what it learned, or of the bare base where it needs that."""
    rows = {one: seats[one] if one.needs == "dev_scores" else BARE for one in learners}
    shares = [Share(seats[one], row, one.prepared.dev_set, one.dev_units) for one, row in rows.items()]
    totals = torch.zeros(len(seats), dtype=torch.float64)
    for mixed in passes(base.model, attachment, shares, learners[0].form, recipe.tokens_per_batch):
        totals.index_add_(0, mixed.owner_M.cpu(), mixed.losses_M.double().cpu())
    if len(learners) > 1 and not bool(totals.isfinite().all()):  # as with gradients: one may have spoilt all
        return {one: _dev_losses(base, attachment, [one], seats, recipe)[one] for one in learners}
    return {one: float(totals[seats[one]]) / one.num_target_tokens_of_dev for one in learners}


def _written_scores(
    base: Base,
    attachment: Attachment,
    learners: Sequence[UserLearner],
    seats: Seats,
    recipe: TrainingRecipe,
) -> dict[UserLearner, dict[str, float]]:
    """The recipe's metric on what each writes for the beginning of its dev set; all write together."""
    if not learners:
        return {}
    of_each = {
        one: [e for e in one.prepared.dev_examples if e.targets][: recipe.dev_metric_sources] for one in learners
    }
    prepared = learners[0].prepared
    attachment.rows = [seats[one] for one, examples in of_each.items() for _ in examples]
    texts = dict(
        generate_each(
            base,
            [e for examples in of_each.values() for e in examples],
            text_format=prepared.text_format,
            decoding=prepared.decoding,
        )
    )
    found: dict[UserLearner, dict[str, float]] = {}
    first, metric = 0, recipe.dev_metric
    for one, examples in of_each.items():
        written = [texts[first + n] for n in range(len(examples))]
        found[one] = {f"dev_{metric}": score([e.targets for e in examples], written, [metric])[metric]}
        first += len(examples)
    return found
