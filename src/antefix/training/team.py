"""Those whose prefixes are trained together: who is at work, who waits, and who has room in the next forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from antefix.attach import attached
from antefix.batches.form import BatchForm, batch_form
from antefix.errors import AntefixError
from antefix.prefix import Prefix
from antefix.training.mixing import Extent
from antefix.training.prepared import Prepared
from antefix.training.run import card_of
from antefix.training.user_learner import Need, UserLearner
from antefix.training.users import User

PASSES_AT_WORK = 4
"""So many forward passes' worth of steps are at work, unless told otherwise: enough to fill passes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be done, and who is told of it."""

    users: Sequence[User]
    prepare: Callable[[User], Prepared]
    """Makes a user ready. What it raises is told of the user."""
    keep: Callable[[User, Prefix], None]
    """Takes a finished prefix; its card has the dev loss of the bare base among the scores."""
    fail: Callable[[User, str], None]
    """Is told of a user that could not be trained, and why."""
    planned_steps: Callable[[User], int]
    """How many steps a user takes, for the time that is left."""
    checkpoints: Path | None = None
    """A folder for those of users in the middle."""
    tokens_at_work: int | None = None
    """Users are at work whose steps have together about so many tokens, but always one; None: four forward passes'."""
    tags: tuple[str, ...] = ()
    licence: str | None = None
    notes: str = ""


class Team:
    """The users of one run. A user who is done, or has failed, leaves when the others' forward pass is over."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._waiting = deque(work.users)
        self.at_work: list[UserLearner] = []
        self.form: BatchForm | None = None
        """Of all batches; asked of the base with the first prefix."""
        self.num_done = 0
        """Users who are done, failed ones among them."""
        self._steps_of_waiting = sum(map(work.planned_steps, work.users))

    @property
    def num_users(self) -> int:
        """All together."""
        return len(self._work.users)

    @property
    def num_steps_left(self) -> int:
        """Of all users together, if none stops early."""
        return self._steps_of_waiting + sum(one.learner.num_steps_left for one in self.at_work)

    @property
    def is_complete(self) -> bool:
        """Whether nobody is over who should have left."""
        return all(learner.needs is not None for learner in self.at_work)

    def admit(self) -> bool:
        """Let in those who wait, while there is room. False: nobody is left."""
        while self._waiting:
            if self.at_work and self._tokens_at_work() >= self._room():
                break
            user = self._waiting.popleft()
            self._steps_of_waiting -= self._work.planned_steps(user)
            try:
                self.at_work.append(self._learner(user))
            except AntefixError as error:
                self._gone(user, str(error))
        return bool(self.at_work)

    def let_go(self) -> None:
        """Those who are over leave, and what they learned is kept."""
        for one in [one for one in self.at_work if one.needs is None]:
            self.at_work.remove(one)
            prefix = self._prefix(one)
            try:
                self._work.keep(one.user, prefix)
            except AntefixError as error:
                self._gone(one.user, str(error))
                continue
            one.learner.forget()
            self.num_done += 1

    def dismiss(self, one: UserLearner, reason: str) -> None:
        """This one cannot go on."""
        self.at_work.remove(one)
        one.learner.forget()
        self._gone(one.user, reason)

    def save(self, *, at_once: bool = False) -> None:
        """Checkpoints of all at work, where they are due."""
        for one in self.at_work:
            one.learner.save(at_once=at_once)

    def those_who_need(self, need: Need) -> list[UserLearner]:
        """The ones who are behind first."""
        return sorted((one for one in self.at_work if one.needs == need), key=lambda one: one.steps_done)

    def next_to_step(self, tokens_per_batch: int) -> list[UserLearner]:
        """Whose steps fill one forward pass; one alone if its step takes several."""
        assert self.form is not None
        chosen: list[UserLearner] = []
        extent = Extent(0, 0, 0)
        for learner in self.those_who_need("step"):
            more = extent.beside(learner.extent)
            if not chosen or more.tokens_fed(self.form) <= tokens_per_batch:
                chosen.append(learner)
                extent = more
        return chosen

    def _learner(self, user: User) -> UserLearner:
        prepared = self._work.prepare(user)
        if self.form is None:
            with attached(prepared.base.model, prepared.module.eval()):
                self.form = batch_form(prepared.base.model, prepared.train_set, prepared.training.packed)
        folder = self._work.checkpoints
        return UserLearner(user, prepared, self.form, None if folder is None else folder / f"{user.name}.safetensors")

    def _room(self) -> int:
        budget = self.at_work[0].prepared.training.tokens_per_batch
        return self._work.tokens_at_work or PASSES_AT_WORK * budget

    def _tokens_at_work(self) -> int:
        return sum(learner.extent.num_tokens for learner in self.at_work)

    def _gone(self, user: User, reason: str) -> None:
        self.num_done += 1
        self._work.fail(user, reason)

    def _prefix(self, learner: UserLearner) -> Prefix:
        work, outcome = self._work, learner.outcome()
        card = card_of(learner.prepared, outcome, work.tags, work.licence, work.notes)
        prefix = Prefix(outcome.tensors, card)
        return prefix if learner.base_loss is None else prefix.with_scores("base", {"dev_loss": learner.base_loss})
