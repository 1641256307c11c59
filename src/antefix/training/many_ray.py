"""Many users over several processes or machines: workers of Ray, each with its own base, take users in groups.

Users' examples travel to the workers; the bank's folder and the run's must be the same for all of them, and the base
must be there. A worker that is lost costs its group once: another worker takes it, and what it had kept is in the bank
and is not done again. Whose group is lost twice has failed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from antefix.bank import Bank
from antefix.base import Base
from antefix.errors import AntefixError, TrainingError, one_line
from antefix.training.identity import is_done
from antefix.training.many import ManyReport, train_many
from antefix.training.many_run import ManyPlan, work_of
from antefix.training.prepared import recipe_base
from antefix.training.users import User

USERS_IN_GROUP = 32
"""At most: enough for full forward passes, and few enough to lose."""
_GROUPS_EACH = 4
"""So many groups a worker, where there are users enough: the last ones then end at about the same time."""
_MOST_LOSSES = 2
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the workers are."""

    num_workers: int
    address: str | None = None
    """Of a cluster that runs already; None: processes of this machine."""
    tokens_at_work: int | None = None


class Worker:
    """One process with a base. Its methods run in two threads: one trains, the other answers."""

    def __init__(self, plan: ManyPlan, tokens_at_work: int | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._plan = plan
        self._tokens_at_work = tokens_at_work
        self._stop = threading.Event()
        self._base: Base | None = None
        self._report: ManyReport | None = None

    def train(self, users: Sequence[User], overwrite: bool) -> dict[str, str]:
        """Train those of a group who are not done; name -> why of those who failed. Stopped, it ends early."""
        failed: dict[str, str] = {}
        base = self._base = self._base or recipe_base(self._plan.recipe)
        bank = Bank(self._plan.recipe.bank)
        left = [u for u in users if not is_done(bank, u, self._plan.digest, overwrite=overwrite)]

        def fail(user: User, reason: str) -> None:
            failed[user.name] = reason

        # A stop was asked for by who called, and checkpoints are saved: it is no interruption of this process.
        with suppress(KeyboardInterrupt):
            work = work_of(self._plan, left, base, fail, tokens_at_work=self._tokens_at_work)
            train_many(base, work, watch=self._watch, stop_requested=self._stop.is_set)
        self._report = None
        return failed

    def report(self) -> ManyReport | None:
        """How far the group is."""
        return self._report

    def stop(self) -> None:
        """Save checkpoints after the current turn, and end."""
        self._stop.set()

    def _watch(self, report: ManyReport) -> None:
        self._report = report


def _with_whole_paths(plan: ManyPlan) -> ManyPlan:
    """A worker has another working directory: what a recipe calls `bank` is that of who asked."""
    recipe = plan.recipe
    update: dict[str, Any] = {"bank": str(Path(recipe.bank).resolve()), "run": str(recipe.run_folder.resolve())}
    if Path(recipe.base).exists():  # else it is a name
        update["base"] = str(Path(recipe.base).resolve())
    if started_from := recipe.config.get("initial_prefix"):
        update["config"] = {**recipe.config, "initial_prefix": str(Path(started_from).resolve())}
    return replace(plan, recipe=recipe.model_copy(update=update))


def groups_of(users: Sequence[User], num_workers: int) -> list[list[User]]:
    """Users in groups to be handed out, as even as can be."""
    wanted = min(len(users), max(num_workers * _GROUPS_EACH, -(-len(users) // USERS_IN_GROUP)))
    edges = [len(users) * n // wanted for n in range(wanted + 1)] if wanted else [0]
    return [list(users[first:last]) for first, last in pairwise(edges)]


def train_over_ray(
    plan: ManyPlan, cluster: Cluster, fail: Callable[[User, str], None], *,
    overwrite: bool = False,
    watch: Callable[[int, Sequence[ManyReport]], None] = lambda num_done, reports: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Train a plan's users. watch: is told how many users are done, and of the groups that are at work.

    Raises TrainingError where Ray is not installed or not reached, or a group can be trained by no worker, and
    KeyboardInterrupt, when all workers have saved what they had, after `stop_requested`.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a run is sent to anybody unasked
    with redirect_stdout(sys.stderr):  # Ray prints of lost workers, and results alone belong on stdout
        try:
            ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = cluster.address or "this machine"
            raise TrainingError(f"Ray at {where} is not reached: {one_line(error)}") from error
        try:
            _Crew(ray, _with_whole_paths(plan), cluster, fail, overwrite).work(watch, stop_requested)
        finally:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise TrainingError("workers need Ray: pip install 'antefix[ray]', or leave --workers out") from error
    return ray


@dataclass
class _Group:
    users: list[User]
    losses: int = 0


class _Crew:
    """The workers, what each is at, and what waits."""

    def __init__(
        self, ray: Any, plan: ManyPlan, cluster: Cluster, fail: Callable[[User, str], None], overwrite: bool
    ) -> None:
        self._ray, self._fail, self._overwrite = ray, fail, overwrite
        self._waiting = deque(_Group(users) for users in groups_of(plan.waiting, cluster.num_workers))
        self._at_work: dict[Any, tuple[Any, _Group]] = {}  # future -> worker, group
        self._num_done = 0
        in_all = int(ray.cluster_resources().get("CPU", 1))
        if cluster.num_workers > in_all:  # Ray would let those without a core wait for ever
            raise TrainingError(f"{cluster.num_workers} workers, but {in_all} cores: lower --workers")
        cores = in_all // cluster.num_workers
        self._bank = Bank(plan.recipe.bank)
        worker = ray.remote(num_cpus=cores, max_concurrency=2)(Worker)
        in_store = ray.put(plan)
        self._hire: Callable[[], Any] = lambda: worker.remote(in_store, cluster.tokens_at_work, cores)
        self._num_workers = min(cluster.num_workers, len(self._waiting))

    def work(self, watch: Callable[[int, Sequence[ManyReport]], None], stop_requested: Callable[[], bool]) -> None:
        for _ in range(self._num_workers):
            self._hand_out(self._hire())
        while self._at_work:
            done, _ = self._ray.wait(list(self._at_work), timeout=_LOOK_SECONDS)
            for future in done:
                self._take_back(future)
            watch(self._num_done, self._reports())
            if stop_requested():
                self._stop()
                raise KeyboardInterrupt

    def _hand_out(self, worker: Any) -> None:
        if self._waiting:
            group = self._waiting.popleft()
            self._at_work[worker.train.remote(group.users, self._overwrite)] = (worker, group)

    def _take_back(self, future: Any) -> None:
        worker, group = self._at_work.pop(future)
        try:
            failed = self._ray.get(future)
        except self._ray.exceptions.RayActorError as error:
            self._lost(group, f"its worker was lost ({type(error).__name__})")
            if self._waiting:
                self._hand_out(self._hire())
            return
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AntefixError):  # of the recipe: no other group will fare better
                raise error.cause from error
            self._lost(group, f"{type(error.cause).__name__}: {one_line(error.cause)}")
            self._hand_out(worker)
            return
        for user in group.users:
            if user.name in failed:
                self._fail(user, failed[user.name])
            elif user.name not in self._bank:
                where = self._bank.folder
                self._fail(user, f"a worker kept it, but it is not in {where}: all must see the same folders")
        self._num_done += len(group.users)
        self._hand_out(worker)

    def _lost(self, group: _Group, why: str) -> None:
        """Another try for a group, or none."""
        group.losses += 1
        if group.losses < _MOST_LOSSES:
            self._waiting.appendleft(group)
        else:
            self._give_up(group, f"{why}, {group.losses} times")

    def _give_up(self, group: _Group, reason: str) -> None:
        self._num_done += len(group.users)
        for user in group.users:
            self._fail(user, reason)

    def _reports(self) -> list[ManyReport]:
        found = []
        for worker, _ in self._at_work.values():
            try:
                report = self._ray.get(worker.report.remote(), timeout=_LOOK_SECONDS)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
                continue  # lost, or still loading its base
            if report is not None:
                found.append(report)
        return found

    def _stop(self) -> None:
        for worker, _ in self._at_work.values():
            worker.stop.remote()
        self._ray.wait(list(self._at_work), num_returns=len(self._at_work))
