"""What is measured of a server, in Prometheus' form.

Labels are bounded: the first so many prefixes have a label of their own, all others share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from antefix.server.engine import Status

MOST_LABELS = 100
OTHERS = "(others)"
BASE = "(base)"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Meters:
    """Counters and histograms that requests move, and gauges that are read off the engine when asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        self.requests = Counter("antefix_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "antefix_request_seconds", "From a request to its reply's end.", ["route"], buckets=_SECONDS, registry=own
        )
        self.first_token = Histogram(
            "antefix_time_to_first_token_seconds", "From a request to its first token.", ["prefix"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.prompt_tokens = Counter("antefix_prompt_tokens", "Tokens read.", ["prefix"], registry=own)
        self.written_tokens = Counter("antefix_written_tokens", "Tokens written.", ["prefix"], registry=own)
        self.gone = Counter("antefix_clients_gone", "Requests whose client went away before the end.", registry=own)
        names = {
            "alive": "Whether the engine takes jobs.",
            "queue": "Jobs that wait for a row.",
            "running": "Jobs that have a row.",
            "batch_fill": "Rows at work of those there are.",
            "tokens_per_second": "Written over the last seconds.",
            "resident_bytes": "Memory of prefixes.",
            "resident_prefixes": "Prefixes in memory.",
            "worker_restarts": "How often the engine's worker was started again.",
        }
        self._gauges = {name: Gauge(f"antefix_{name}", text, registry=own) for name, text in names.items()}
        self._labels: set[str] = set()

    def label(self, prefixes: tuple[str, ...]) -> str:
        """What a request for these prefixes is counted as."""
        name = "+".join(prefixes) or BASE
        if name in self._labels or len(self._labels) < MOST_LABELS:
            self._labels.add(name)
            return name
        return OTHERS

    def page(self, status: Status, num_resident: int) -> bytes:
        """All of it, as Prometheus reads it."""
        told = {
            "alive": float(status.alive),
            "queue": status.waiting,
            "running": status.running,
            "batch_fill": status.batch_fill,
            "tokens_per_second": status.tokens_per_s,
            "resident_bytes": status.resident_bytes,
            "resident_prefixes": num_resident,
            "worker_restarts": status.num_restarts,
        }
        for name, value in told.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry)
