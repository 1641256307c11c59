"""One or two files of texts, measured: the scores, the paired bootstrap and the check of table values in one record.

What `antefix eval` prints. What a score is, stands with each metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from antefix.errors import MetricError
from antefix.metrics import E2E_METRICS, RESAMPLES, bootstrap, evaluate, fields, load
from antefix.metrics.bootstrap import Comparison
from antefix.metrics.fields import FieldReport, check_fields
from antefix.metrics.files import read_hypotheses, read_references
from antefix.metrics.tokens_ptb import have_java


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One file of hypotheses and what it scored."""

    name: str
    """The file."""
    scores: dict[str, float]
    """Name of the metric -> corpus score."""
    fields: FieldReport | None
    """None where table values were not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured, on what."""

    references: str
    num_inputs: int
    num_references: int
    systems: tuple[System, ...]
    """One, or two that are compared."""
    comparison: dict[str, Comparison]
    """Name of the metric -> the first system against the second; empty where there is one."""
    left_out: tuple[str, ...]
    """Metrics that nobody asked for by name, and that need Java, which is not there."""

    def to_card(self) -> dict[str, Any]:
        """What a prefix's card says of its texts: the first system's scores, on what, and how they were measured."""
        content = self.to_dict()
        kept = {name: content[name] for name in ("inputs", "reference_texts", "scores", "versions")}
        return {"references": Path(self.references).name, **kept}

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the first system's `scores`, the second one under `compare`, the version of all that was done."""
        first, *others = map(_system, self.systems)
        content = {
            "references": self.references,
            "inputs": self.num_inputs,
            "reference_texts": self.num_references,
            **first,
            "versions": {name: load(name).VERSION for name in first["scores"]},
            "left_out": list(self.left_out),
        }
        for other in others:
            differences = {name: asdict(comparison) for name, comparison in self.comparison.items()}
            content["compare"] = {**other, "version": bootstrap.VERSION, "differences": differences}
        return content


def measure(
    references: str,
    hypotheses: str,
    *,
    split: str | None = None,
    reader: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    compare: str | None = None,
    with_fields: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Score a file of texts, and another one beside it.

    references, split, reader: see `files.read_references`. hypotheses, compare: see `files.read_hypotheses`. metrics:
    None means those of the E2E challenge, as far as there is Java for them. with_fields: also check the values of the
    tables, which the references must hold then. Raises DataError for a file that cannot be read, and MetricError
    for what `evaluate` and `bootstrap.compare` refuse.
    """
    names, left_out = _chosen(metrics)
    known = read_references(references, split, reader)
    files = [hypotheses] if compare is None else [hypotheses, compare]
    texts = [read_hypotheses(file, known) for file in files]
    tables = known.tables() if with_fields else None
    scored = [evaluate(known.groups, system, names) for system in texts]
    systems = [
        System(
            name=file,
            scores={name: e.score for name, e in found.items()},
            fields=None if tables is None else check_fields(tables, system),
        )
        for file, system, found in zip(files, texts, scored, strict=True)
    ]
    return Report(
        references=references,
        num_inputs=len(known.groups),
        num_references=sum(map(len, known.groups)),
        systems=tuple(systems),
        comparison={} if compare is None else bootstrap.compare(*scored, resamples=resamples, seed=seed),
        left_out=left_out,
    )


def _chosen(metrics: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """The metrics to compute, and those of the default that there is no Java for."""
    if metrics is None:
        have = have_java()
        left_out = tuple(name for name in E2E_METRICS if not have and load(name).NEEDS_JAVA)
        return [name for name in E2E_METRICS if name not in left_out], left_out
    if not metrics:
        raise MetricError("no metric is named")
    for name in metrics:
        load(name)  # a mistyped name is told before any file is read
    return list(metrics), ()


def _system(system: System) -> dict[str, Any]:
    content: dict[str, Any] = {"hypotheses": system.name, "scores": system.scores}
    if system.fields is not None:
        found = system.fields
        content["fields"] = {
            "version": fields.VERSION,
            "checked": found.checked,
            "not_checkable": found.not_checkable,
            "missing": sum(map(len, found.missing)),
            "missing_share": found.missing_share,
            "added": sum(map(len, found.added)),
            "added_share": found.added_share,
            "texts": [
                {"missing": missing, "added": added} for missing, added in zip(found.missing, found.added, strict=True)
            ],
        }
    return content
