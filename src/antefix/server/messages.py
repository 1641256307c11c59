"""What goes to an engine and what comes back: plain values that cross the border between processes.

Token ids only, never text; a prefix is a name in the bank, never tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from antefix.errors import ServingKind

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place, the likeliest first: `(id, log-probability)`."""

EndReason = Literal["stop", "length", "cancelled"]
"""Why a job ended: the token that ends a text came; as many tokens as asked for; nobody wants it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one job's tokens are chosen; a job's neighbours in the batch have no part in it."""

    max_tokens: int
    """At most so many tokens are written; 0 only scores the prompt."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probabilities sum to at least this are drawn from; 1: all."""
    seed: int | None = None
    """The same seed draws the same tokens; None draws anew each time."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time the job has written it already (the prompt does not count)."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that the job has written already."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """So many likeliest tokens are told with each token, and its own log-probability; None: none of it.

    Log-probabilities are those of the model itself: before penalties, bias, temperature and top-p."""
    prompt_logprobs: bool = False
    """Whether the prompt's tokens are scored too, in a `PromptScored` before the first token."""
    ignore_eos: bool = False
    """Whether the token that ends a text is a token like any other."""


@dataclass(frozen=True, slots=True)
class Job:
    """One text to be written."""

    id: str
    """Told with every event; no two open jobs have the same."""
    prompt: tuple[int, ...]
    prefixes: tuple[str, ...]
    """Names in the bank, () for the bare base; of several the slots stand side by side, in this order."""
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of a job. The token that ends a text is not told, unless it is a token like any other."""

    job: str
    id: int
    logprob: float | None
    """None where `Sampling.logprobs` is."""
    top: Top


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The log-probability of every token of the prompt after those before it; nothing stands before the first: None."""

    job: str
    logprobs: tuple[float | None, ...]
    top: tuple[Top, ...]
    """For each of them the likeliest tokens at its place, `Sampling.logprobs` of them; () for the first."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's last event, if all went well."""

    job: str
    reason: EndReason
    num_slots: int = 0
    """How many slots of prefixes the job had at a site."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A job's last event, if something went wrong."""

    job: str
    message: str
    kind: ServingKind


Event = Token | PromptScored | Finished | Failed


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this job any more."""

    job: str


Action = Literal["load", "unload", "pin"]
"""What is done with a prefix: read it into memory, also where it is there and its files changed; forget it and its pin,
while jobs that have it go on; read it and never drop it for others."""


@dataclass(frozen=True, slots=True)
class Order:
    """Something to be done with a prefix."""

    request: int
    action: Action
    name: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more jobs, end when the last one is done."""


Command = Job | Cancel | Order | Drain


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to an order."""

    request: int
    problem: Failed | None


@dataclass(frozen=True, slots=True)
class Resident:
    """A prefix in memory."""

    name: str
    num_bytes: int
    pinned: bool
    at_work: int
    """How many jobs have it now."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the worker says of itself, several times a second while it works."""

    waiting: int
    running: int
    tokens_per_s: float
    """Written over the last seconds."""
    resident_bytes: int
    resident: tuple[Resident, ...] | None
    """The latest used last; None: as it was when last told."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has its base and takes jobs."""


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The worker cannot start, and why."""

    message: str


Report = Event | Done | Measured | Ready | NotStarted
"""What comes from the worker."""
