"""What a job carries: one kept prefix or several side by side, ready to be attached.

Axes: P slots, G key/value heads, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from antefix.errors import ServingError
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue


@dataclass(eq=False)
class Carried:
    """A prefix in memory. Told from others by identity: what is read again from changed files is another one."""

    names: tuple[str, ...]
    module: MethodModule
    stop_token_id: int
    """What ends the texts that it was trained on."""
    num_bytes: int
    parts: tuple[Carried, ...] = ()
    """The prefixes that it was made of, where it is several side by side."""
    dropped: bool = False
    """Whether it is no longer in memory for other jobs than those that have it."""

    num_slots: int = field(init=False)
    """Of a site."""

    def __post_init__(self) -> None:
        self.num_slots = self.module.num_virtual_tokens

    @property
    def is_dropped(self) -> bool:
        """Whether it, or one of its parts, is to be attached no longer than its jobs need it."""
        return self.dropped or any(part.dropped for part in self.parts)

    @property
    def shift(self) -> int:
        """Positions of the context that it takes."""
        return self.num_slots if self.module.positions == "shifted" else 0


def side_by_side(several: Sequence[Carried]) -> Carried:
    """Several prefixes as one: at every site their slots in this order.

    Defined for those that are kept as plain keys and values, all seen by the same tokens, with one convention for
    positions; where that is `shifted`, texts stand after the slots of all of them. Raises ServingError.
    """
    names = tuple(name for one in several for name in one.names)
    listed = " + ".join(names)
    for one in several:
        if not type(one.module).folds_to_key_value or one.module.branches():
            raise ServingError(
                f"{listed}: '{one.names[0]}' is not kept as plain keys and values, so nothing can stand beside it on "
                "one request: ask for it alone",
                "unsupported",
            )
    if len({one.module.positions for one in several}) > 1:
        raise ServingError(
            f"{listed}: some have shifted positions and some do not: ask for prefixes of one kind", "unsupported"
        )
    if len({one.module.for_targets for one in several}) > 1:
        raise ServingError(
            f"{listed}: some are seen by targets alone and some by all tokens: ask for prefixes of one kind",
            "unsupported",
        )
    module = _SideBySide([one.module for one in several])
    return Carried(names, module, several[0].stop_token_id, num_bytes=0, parts=tuple(several))


class _SideBySide(MethodModule):
    def __init__(self, modules: Sequence[MethodModule]) -> None:
        super().__init__()
        self._num_slots = sum(m.num_virtual_tokens for m in modules)
        self._positions, self._for_targets = modules[0].positions, modules[0].for_targets
        with torch.no_grad():
            every = [m.slots() for m in modules]
            self._slots = {
                name: KeyValue(*(torch.cat(part, dim=1) for part in _parts([s[name] for s in every if name in s])))
                for name in dict.fromkeys(name for slots in every for name in slots)
            }

    @property
    def positions(self) -> Positions:
        return self._positions

    @property
    def num_virtual_tokens(self) -> int:
        return self._num_slots

    @property
    def for_targets(self) -> bool:
        return self._for_targets

    def slots(self) -> dict[str, KeyValue]:
        return self._slots


def _parts(pairs: Sequence[KeyValue]) -> tuple[list[Tensor], list[Tensor]]:
    return [p.key_GPD for p in pairs], [p.value_GPE for p in pairs]
