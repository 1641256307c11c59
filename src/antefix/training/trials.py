"""The trials of a search, drawn by Optuna and kept in its journal: a file to which every event is appended.

A search that was cut off anywhere (Ctrl-C, kill -9, a power cut) goes on as if it had not been: what a trial draws is a
function of the seed and of the trials that ended before it. A trial that did not end is drawn again with the same
values. Knows Optuna and files; never trains.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from antefix.errors import TrainingError, one_line
from antefix.training.space import Range, Value

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as OptunaTrial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

JOURNAL_FILE = "trials.jsonl"
_STUDY, _FACTS, _RESULT = "search", "facts", "result"
_RANDOM_TRIALS = 5
"""So many are drawn at random before the estimator takes over: Optuna's own 10 would be a whole search here."""
_UNPRUNED_TRIALS, _UNPRUNED_EVALUATIONS = 3, 2
"""A median of fewer trials, and scores of the warm-up, tell nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting that was tried."""

    number: int
    """Counted from 1, trials that were cut off left out."""
    values: Mapping[str, Value]
    """By dotted key of the recipe."""
    state: Literal["done", "pruned", "failed"]
    score: float | None = None
    """Dev score of the step that `antefix train` would keep; of a pruned trial its best; None of a failed one."""
    kept_step: int | None = None
    seconds: float = 0.0
    why: str | None = None
    """Why it failed."""
    same_as: int | None = None
    """The trial that had the same values, and so the same score: it was not done twice."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "values": dict(self.values)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """What is searched."""

    space: Mapping[str, Range]
    maximise: bool
    seed: int
    prune: bool
    facts: Mapping[str, str] = field(default_factory=dict)
    """What makes trials comparable, by name: a journal of other facts is refused."""


class Trials:
    """The ended trials of one search, and the one that is under way; `open_trials` makes it."""

    def __init__(self, path: Path, plan: SearchPlan) -> None:
        self._path, self._plan = path, plan
        self._study = _open_study(path, plan)
        self._distributions = {key: _distribution(values) for key, values in plan.space.items()}
        self._trial: OptunaTrial | None = None
        self.ended: list[Trial] = []
        for frozen in self._study.get_trials(deepcopy=False):
            result = frozen.user_attrs.get(_RESULT)
            if not frozen.state.is_finished():  # killed in it, or between its result and its end
                self._tell(frozen.number, result)
            if result is not None:
                self.ended.append(_trial(len(self.ended) + 1, frozen, result))

    @property
    def best(self) -> Trial | None:
        """The done trial with the best score, the first of equals."""
        return next((t for t in self.ranked if t.state == "done"), None)

    @property
    def ranked(self) -> list[Trial]:
        """Done ones, then pruned ones, then failed ones; the best score first."""
        sign = -1 if self._plan.maximise else 1
        states = ("done", "pruned", "failed")
        return sorted(self.ended, key=lambda t: (states.index(t.state), sign * (t.score or 0.0), t.number))

    def start(self) -> dict[str, Value]:
        """Draw the next trial's values."""
        from optuna.samplers import TPESampler

        # A fresh sampler a trial: one that goes on drawing would begin anew in a search that goes on.
        seed = (self._plan.seed * 1_000_003 + len(self.ended)) % 2**32
        self._study.sampler = TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=seed)
        with _writing(self._path):
            self._trial = self._study.ask(self._distributions)
        return dict(self._trial.params)

    def report(self, evaluation: int, score: float) -> bool:
        """Tell the score of an evaluation, counted from 1; True if the trial is not worth going on with."""
        if not (self._plan.prune and math.isfinite(score)):
            return False
        assert self._trial is not None
        with _writing(self._path):
            self._trial.report(score, evaluation)
            return self._trial.should_prune()

    def end(self, **result: Any) -> Trial:
        """Keep what became of the trial: the fields of `Trial`."""
        assert self._trial is not None
        with _writing(self._path):
            self._trial.set_user_attr(_RESULT, result)
            self._tell(self._trial.number, result)
        frozen = self._study.get_trials(deepcopy=False)[self._trial.number]
        self.ended.append(_trial(len(self.ended) + 1, frozen, result))
        self._trial = None
        return self.ended[-1]

    def _tell(self, optuna_number: int, result: dict[str, Any] | None) -> None:
        from optuna.trial import TrialState

        states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        state = TrialState.FAIL if result is None else states.get(result["state"], TrialState.FAIL)
        value = result["score"] if result is not None and state == TrialState.COMPLETE else None
        self._study.tell(optuna_number, value, state)


@contextmanager
def open_trials(path: Path, plan: SearchPlan, *, anew: bool = False) -> Iterator[Trials]:
    """The trials kept in this file, alone with it. anew: drop them first.

    Raises TrainingError: Optuna is missing, another process searches here, the trials are those of another search, or
    the file cannot be read or written.
    """
    optuna = require_optuna()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{path.parent}: another process is searching here; wait for it, or end it") from error
        with _writing(path):
            _mend(path, file, anew)
        yield Trials(path, plan)
    finally:
        optuna.logging.set_verbosity(verbosity)
        file.close()


def require_optuna() -> Any:
    """Optuna. Raises TrainingError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise TrainingError("a search needs Optuna: pip install 'antefix[search]'") from error
    return optuna


def _mend(path: Path, file: IO[bytes], anew: bool) -> None:
    """Remove what a killed process leaves: half a line, which the next would be glued to, and Optuna's own lock."""
    file.seek(0)
    content = file.read()
    whole = 0 if anew else content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
        os.fsync(file.fileno())
    for stale in path.parent.glob(f"{path.name}.lock*"):
        stale.unlink(missing_ok=True)


def _open_study(path: Path, plan: SearchPlan) -> Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS, n_warmup_steps=_UNPRUNED_EVALUATIONS)
    try:
        with _writing(path):
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
            if _STUDY in optuna.get_all_study_names(storage):
                study = optuna.load_study(study_name=_STUDY, storage=storage, pruner=pruner)
            else:
                direction: Literal["minimize", "maximize"] = "maximize" if plan.maximise else "minimize"
                study = optuna.create_study(storage=storage, study_name=_STUDY, direction=direction, pruner=pruner)
            facts = study.user_attrs.get(_FACTS, {})
            if not facts and not study.get_trials(deepcopy=False):
                facts = dict(plan.facts)
                study.set_user_attr(_FACTS, facts)
        changed = [name for name, fact in plan.facts.items() if facts.get(name) != fact]
    except TrainingError:
        raise
    except Exception as error:  # whatever Optuna meets in a file that is none of its own
        said = f"{type(error).__name__}: {one_line(error)}"
        raise TrainingError(f"{path}: not a readable journal of trials ({said}); --anew drops it") from error
    if changed:
        raise TrainingError(
            f"{path.parent} holds a search with other {', '.join(changed)}: give this recipe another `run` folder, or "
            "drop that search with --anew"
        )
    return study


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror or error}); the trials that ended are kept"
        ) from error


def _distribution(values: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices is not None:
        return CategoricalDistribution(values.choices)
    low, high = values.low, values.high
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=values.log)
    assert low is not None
    assert high is not None
    return FloatDistribution(low, high, log=values.log)


def _trial(number: int, frozen: FrozenTrial, result: dict[str, Any]) -> Trial:
    return Trial(number=number, values=dict(frozen.params), **result)
