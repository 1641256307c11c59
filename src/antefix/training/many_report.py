"""What a run for many users came to: a row for each, a histogram, and the worst with the reason."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from antefix import atomic
from antefix.bank import Bank
from antefix.errors import PrefixError, TrainingError
from antefix.prefix import Card
from antefix.training.identity import Identity, identity_of
from antefix.training.many_run import ManyPlan
from antefix.training.users import User

REPORT_FILE, PLOT_FILE = "report.json", "scores.png"
WORST = 10
_FEW = 0.5
"""Who has less than this part of the median's pairs has few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRow:
    """One user."""

    name: str
    by: Mapping[str, str]
    outcome: Literal["trained", "unchanged", "failed", "waiting"]
    """`waiting`: the run was interrupted before."""
    pairs: int
    dev_loss: float | None = None
    """Of the kept step."""
    base_dev_loss: float | None = None
    """Of the bare base, on the same dev set."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Further dev scores of the kept step."""
    steps: int = 0
    kept_step: int = 0
    stopped_early: bool = False
    error: str | None = None
    reasons: tuple[str, ...] = ()
    """What may be why the scores are bad."""

    @property
    def gain(self) -> float:
        """How far below the base's own the dev loss is; negative infinity where nothing was learned."""
        if self.dev_loss is None or self.base_dev_loss is None:
            return float("-inf")
        return self.base_dev_loss - self.dev_loss


@dataclass(frozen=True, slots=True)
class UsersReport:
    """Of everybody."""

    rows: list[UserRow]
    skipped: Sequence[Mapping[str, Any]]
    """Who had too few pairs."""
    without_value: Mapping[str, int]
    """Rows that are nobody's, by the column in which they have nothing."""

    def count(self, outcome: str) -> int:
        """How many users came to this."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def worst(self) -> list[UserRow]:
        """Failed ones first, then those with the lowest further score, or who gained least over the base.

        Where the base's loss is not known, those with the highest dev loss.
        """
        done = [row for row in self.rows if row.dev_loss is not None]
        metric = next((name for row in done for name in row.scores), None)
        base_is_known = any(row.base_dev_loss is not None for row in done)

        def quality(row: UserRow) -> float:
            if metric is not None:
                return row.scores.get(metric, 0.0)
            return row.gain if base_is_known else -(row.dev_loss or 0.0)

        done.sort(key=quality)
        return [*(row for row in self.rows if row.outcome == "failed"), *done][:WORST]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "users": len(self.rows),
            **{what: self.count(what) for what in ("trained", "unchanged", "failed", "waiting")},
            "skipped": list(self.skipped),
            "rows_without_value": dict(self.without_value),
            "median_dev_loss": _median([row.dev_loss for row in self.rows]),
            "median_base_dev_loss": _median([row.base_dev_loss for row in self.rows]),
            "worst": [row.name for row in self.worst],
            "rows": [asdict(row) for row in self.rows],
        }


def report_of(plan: ManyPlan, failed: Mapping[str, str]) -> UsersReport:
    """From what is in the bank. failed: name -> why."""
    bank, new = Bank(plan.recipe.bank), {user.name for user in plan.waiting}
    few = _FEW * statistics.median(user.num_pairs for user in plan.everybody.users)
    rows = []
    for user in plan.everybody.users:
        if user.name in failed:
            rows.append(_row(user, "failed", None, few, failed[user.name]))
            continue
        try:
            card = bank.card(user.name) if user.name in bank else None
        except PrefixError as error:
            rows.append(_row(user, "failed", None, few, str(error)))
            continue
        if card is None or Identity.of_card(card) != identity_of(user, plan.digest):  # what is there is an older one
            rows.append(_row(user, "waiting", None, few))
        else:
            rows.append(_row(user, "trained" if user.name in new else "unchanged", card, few))
    skipped = [{"by": dict(one.by), "pairs": one.num_pairs} for one in plan.everybody.skipped]
    return UsersReport(rows, skipped, plan.everybody.without_value)


def _row(
    user: User, outcome: Literal["trained", "unchanged", "failed", "waiting"], card: Card | None, few: float,
    error: str | None = None,
) -> UserRow:  # fmt: skip
    reasons = [] if error is None else [f"failed: {error}"]
    if user.num_pairs < few:
        reasons.append(f"few pairs: {user.num_pairs}")
    if not user.dev:
        reasons.append("no dev set")
    if card is None:
        return UserRow(
            name=user.name, by=user.by, outcome=outcome, pairs=user.num_pairs, error=error, reasons=tuple(reasons)
        )
    training = card.training
    kept: dict[str, Any] = next((d for d in card.scores.get("dev", ()) if d["step"] == training["kept_step"]), {})
    dev_loss, base_loss = kept.get("dev_loss"), card.scores.get("base", {}).get("dev_loss")
    if dev_loss is not None and base_loss is not None and dev_loss >= base_loss:
        reasons.append(f"dev loss {dev_loss:.3f} is above the base's own, {base_loss:.3f}")
    if training["stopped_early"]:
        reasons.append(f"stopped early, at step {training['steps']}")
    return UserRow(
        name=user.name, by=user.by, outcome=outcome, pairs=user.num_pairs,
        dev_loss=dev_loss, base_dev_loss=base_loss,
        scores={name: value for name, value in kept.items() if name not in ("step", "dev_loss")},
        steps=training["steps"], kept_step=training["kept_step"], stopped_early=training["stopped_early"],
        reasons=tuple(reasons),
    )  # fmt: skip


def write_report(report: UsersReport, folder: Path, title: str) -> None:
    """`report.json` and `scores.png`. Raises TrainingError where they cannot be written."""
    try:
        content = f"{json.dumps(report.to_dict(), indent=1, ensure_ascii=False)}\n"
        atomic.write_bytes(folder / REPORT_FILE, content.encode())
        _draw(report.rows, title, folder / PLOT_FILE)
    except OSError as error:
        raise TrainingError(f"{folder}: the report cannot be written ({error.strerror or error})") from error


def _draw(rows: Sequence[UserRow], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    losses = [row.dev_loss for row in rows if row.dev_loss is not None]
    base = [row.base_dev_loss for row in rows if row.base_dev_loss is not None]
    metric = next((name for row in rows for name in row.scores), None)
    figure = Figure(figsize=(7 if metric is None else 11, 4), layout="constrained")
    axes = figure.subplots(1, 1 if metric is None else 2, squeeze=False)[0]
    kinds = [(base, "0.75", "the bare base"), (losses, "tab:blue", "with its prefix")]
    axes[0].hist([k[0] for k in kinds], bins=24, color=[k[1] for k in kinds], label=[k[2] for k in kinds])
    axes[0].set(xlabel="dev loss (nats a target token)", ylabel="users", title=title)
    axes[0].legend(frameon=False)
    if metric is not None:
        axes[1].hist([row.scores[metric] for row in rows if metric in row.scores], bins=24, color="tab:blue")
        axes[1].set(xlabel=metric.replace("_", " "), ylabel="users")
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
