"""Which prefixes are in memory: read from the bank when asked for, bounded by bytes; the longest unused go first.

A prefix is kept as what is attached, once; the file's own tensors go. Whether its files are still the same is looked up
at every request (a few calls of `stat`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

from antefix.attachment import Attachment
from antefix.bank import Bank
from antefix.bank.entry import Stamps, stamps_of
from antefix.base import Base
from antefix.data.linearise import TextFormat
from antefix.errors import AntefixError, BankError, ServingError
from antefix.methods.base import MethodModule
from antefix.server.carried import Carried, side_by_side
from antefix.server.messages import Resident


class Residency:
    """The prefixes of a bank that are in memory."""

    def __init__(self, base: Base, bank: Bank, max_bytes: int) -> None:
        self._base, self._bank, self.max_bytes = base, bank, max_bytes
        self._here: OrderedDict[str, tuple[Carried, Stamps]] = OrderedDict()  # the latest used last
        self._pinned: set[str] = set()
        self._at_work: Counter[Carried] = Counter()
        self._several: WeakValueDictionary[tuple[Carried, ...], Carried] = WeakValueDictionary()
        self.num_bytes = 0
        self.num_changes = 0
        """Counts what `resident` would tell otherwise, but for jobs at work."""

    @property
    def num_at_work(self) -> int:
        """How many prefixes jobs hold, each as often as it is held."""
        return self._at_work.total()

    def take(self, names: Sequence[str]) -> tuple[Carried, ...]:
        """The prefixes of a job, in memory until it gives them back. Raises ServingError."""
        taken: list[Carried] = []
        try:
            for name in names:
                taken.append(self.load(name))
                self._at_work[taken[-1]] += 1  # so that the next one does not drop it
        except Exception:
            self.give_back(taken)
            raise
        return tuple(taken)

    def give_back(self, taken: Sequence[Carried]) -> None:
        """A job is done with its prefixes."""
        self._at_work -= Counter(taken)

    def as_one(self, taken: tuple[Carried, ...]) -> Carried | None:
        """What a row carries; None: nothing. Raises ServingError."""
        if len(taken) < 2:
            return taken[0] if taken else None
        if (known := self._several.get(taken)) is None:
            known = self._several[taken] = side_by_side(taken)
        return known

    def load(self, name: str) -> Carried:
        """A prefix, read if it is not here or its files changed. Raises ServingError."""
        stamps = self._stamps(name)
        if name in self._here:
            if self._here[name][1] == stamps:
                self._here.move_to_end(name)
                return self._here[name][0]
            self._drop(name)
        if stamps is None:
            self._pinned.discard(name)
            raise ServingError(f"no prefix '{name}' in the bank", "not_found")
        carried = self._read(name)
        self._make_room(carried)
        self._here[name] = carried, stamps
        self.num_bytes += carried.num_bytes
        self.num_changes += 1
        return carried

    def unload(self, name: str) -> None:
        """Forget a prefix, pinned or not; jobs that have it go on. Raises ServingError (`not_found`)."""
        if name not in self._here:
            raise ServingError(f"the prefix '{name}' is not in memory", "not_found")
        self._pinned.discard(name)
        self._drop(name)

    def pin(self, name: str) -> None:
        """Read a prefix, and keep it whatever else is wanted. Raises ServingError."""
        self.load(name)
        self._pinned.add(name)
        self.num_changes += 1

    def resident(self) -> tuple[Resident, ...]:
        """What is here, the latest used last."""
        return tuple(
            Resident(name, carried.num_bytes, name in self._pinned, self._at_work[carried])
            for name, (carried, _) in self._here.items()
        )

    def _stamps(self, name: str) -> Stamps | None:
        """None: there is no such prefix."""
        return stamps_of(str(self._bank.path(name))) if name in self._bank else None

    def _drop(self, name: str) -> None:
        carried, _ = self._here.pop(name)
        carried.dropped = True
        self.num_bytes -= carried.num_bytes
        self.num_changes += 1

    def _make_room(self, carried: Carried) -> None:
        """Drop what was used longest ago, but for what is pinned or at work. Raises ServingError."""
        if carried.num_bytes > self.max_bytes:
            raise ServingError(
                f"the prefix '{carried.names[0]}' takes {carried.num_bytes:,} bytes, there are {self.max_bytes:,} for "
                "all: give the server more memory for prefixes",
                "unsupported",
            )
        over = self.num_bytes + carried.num_bytes - self.max_bytes
        leaving = []
        for name, (other, _) in self._here.items():
            if over <= 0:
                break
            if name not in self._pinned and not self._at_work[other]:
                leaving.append(name)
                over -= other.num_bytes
        if over > 0:
            raise ServingError(
                f"no memory for the prefix '{carried.names[0]}': all {self.max_bytes:,} bytes hold prefixes that are "
                "pinned or at work; ask again later, or unload one that is pinned",
                "overloaded",
            )
        for name in leaving:
            self._drop(name)

    def _read(self, name: str) -> Carried:
        base = self._base
        try:
            prefix = self._bank[name]
            # The base's fingerprint is known; looking at all weights anew would take longer than reading.
            is_for_base = prefix.card.base.fingerprint == base.fingerprint
            module = prefix.module(base.model, check_base=not is_for_base).requires_grad_(False).eval()
            Attachment(base.model, [module], [module])  # raises where it does not fit
            stop = TextFormat.from_dict(prefix.card.text_format).stop_token_id(base.tokenizer)
        except BankError as error:  # removed meanwhile
            raise ServingError(str(error), "not_found") from error
        except AntefixError as error:
            raise ServingError(f"the prefix '{name}' cannot be used: {error}", "broken_prefix") from error
        _check_can_be_served(f"the prefix '{name}' ({prefix.card.method})", module)
        return Carried((name,), module, stop, num_bytes_of(module))


def _check_can_be_served(what: str, module: MethodModule) -> None:
    reasons = [
        (not module.acts_on_rows, "stands in the place of the base's own weights, which all rows of a batch share"),
        (module.condition_length is not None, "reads a second text, which a request does not have"),
        (module.head is not None, "was trained to label texts, not to write them"),
        (bool(module.symbols), "writes new tokens, which this server cannot spell"),
    ]
    for applies, reason in reasons:
        if applies:
            raise ServingError(f"{what} {reason}: it cannot be served", "unsupported")


def num_bytes_of(module: MethodModule) -> int:
    """What a prefix's tensors take in memory."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
