"""What can be asked for: the base, and the prefixes of a bank. Ids to names, and what the list says of each.

The bank's folder is looked at when somebody asks: what was added or removed since is there, or gone, at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antefix.bank import Bank, Entry, Query
from antefix.bank.entry import Stamps, stamps_of
from antefix.errors import BankError, PrefixError, one_line
from antefix.server.refusal import Refusal
from antefix.server.replies import Model, OfPrefix

if TYPE_CHECKING:
    from antefix.prefix import Card

_MOST_CARDS = 1024


@dataclass(frozen=True)
class Chosen:
    """What a request's model and prefixes come to."""

    id: str
    prefixes: tuple[str, ...]
    """Names in the bank; none: the bare base."""


class Models:
    """The base's id, the bank, and names given while running."""

    def __init__(self, base_id: str, bank: Bank) -> None:
        self.base_id = base_id
        self.bank = bank
        self._created = int(time.time())
        self._aliases: dict[str, str] = {}
        self._cards: dict[str, tuple[Stamps, Card]] = {}

    def id_of(self, name: str) -> str:
        """The id of a prefix."""
        return f"{self.base_id}:{name}"

    def name_of(self, model: str) -> str | None:
        """The prefix that an id or a name means; None: the base. Raises Refusal (404) for neither."""
        if model == self.base_id:
            return None
        name = self.resident_name(model)
        if name not in self.bank:
            raise Refusal(
                404,
                f"there is no model '{one_line(model, 80)}': GET /v1/models lists '{self.base_id}' and the prefixes",
                param="model",
                code="model_not_found",
            )
        return name

    def name_of_prefix(self, model: str) -> str:
        """The prefix that an id or a name means. Raises Refusal (404) for anything else, the base included."""
        name = self.name_of(model)
        if name is None:
            raise Refusal(404, f"'{model}' is the base, not a prefix", param="prefix_name", code="model_not_found")
        return name

    def resident_name(self, model: str) -> str:
        """The same for one that may be gone from the bank, but not from memory.

        A prefix of the bank goes by its own name, though it came after another was given that.
        """
        name = self._bare(model)
        return name if name in self.bank else self._aliases.get(name, name)

    def chosen(self, model: str, more: tuple[str, ...]) -> Chosen:
        """What a request asks for. Raises Refusal for a name that is not there, and for prefixes on a prefix."""
        name = self.name_of(model)
        if not more:
            return Chosen(self.base_id, ()) if name is None else Chosen(self.id_of(name), (name,))
        if name is not None:
            raise Refusal(
                400, f"'antefix.prefixes' goes with model = '{self.base_id}', not with a prefix", param="antefix"
            )
        names = tuple(self.name_of(one) for one in more)
        if None in names or len(set(names)) < len(names):
            raise Refusal(400, "'antefix.prefixes' are prefixes, each once", param="antefix")
        prefixes = tuple(name for name in names if name is not None)
        return Chosen("+".join([self.base_id, *prefixes]), prefixes)

    def refuse_taken(self, alias: str, folder: str) -> None:
        """Raises Refusal (400) for a name under which a prefix of the bank cannot be asked for: it is another's."""
        name = self._bare(alias)
        others = name == self.base_id or name in self.bank or self._aliases.get(name, folder) != folder
        if name != folder and others:
            raise Refusal(400, f"'{one_line(alias, 80)}' is taken: choose another name", param="prefix_name")

    def call(self, alias: str, folder: str) -> None:
        """From now on a prefix of the bank can be asked for under another name too. Raises Refusal (400)."""
        self.refuse_taken(alias, folder)
        if (name := self._bare(alias)) != folder:
            self._aliases[name] = folder

    def forget(self, alias: str) -> bool:
        """The name that was given goes, if it was; the prefix's own stays as long as it is in the bank."""
        return self._aliases.pop(self._bare(alias), None) is not None

    async def page(self, query: Query) -> list[Entry]:
        """A part of the bank's list. Raises Refusal (503) where there is no bank any more."""
        try:
            return (await asyncio.to_thread(self.bank.page, query)).entries
        except (BankError, OSError) as error:
            raise Refusal(503, f"the bank cannot be read: {one_line(error)}", retry_after=5) from error

    def card(self, name: str) -> Card:
        """What a prefix says about itself. Raises Refusal for one that is gone or broken."""
        try:
            stamps = stamps_of(str(self.bank.path(name)))
            if stamps is None or stamps.card is None:
                raise Refusal(404, f"the prefix '{name}' is gone", param="model", code="model_not_found")
            known = self._cards.get(name)
            if known is None or known[0] != stamps:
                known = (stamps, self.bank.card(name))
                if len(self._cards) >= _MOST_CARDS:
                    self._cards.clear()
                self._cards[name] = known
        except (PrefixError, BankError, OSError) as error:
            raise Refusal(400, str(error), param="model", code="broken_prefix") from error
        return known[1]

    def base_model(self) -> Model:
        """What the list says of the base."""
        return {
            "id": self.base_id,
            "object": "model",
            "created": self._created,
            "owned_by": "antefix",
            "root": self.base_id,
            "parent": None,
            "antefix": None,
        }

    def prefix_model(self, name: str, of_prefix: OfPrefix) -> Model:
        """What the list says of a prefix."""
        return {
            "id": self.id_of(name),
            "object": "model",
            "created": self._created,
            "owned_by": "antefix",
            "root": name,
            "parent": self.base_id,
            "antefix": of_prefix,
        }

    def _bare(self, model: str) -> str:
        return model.removeprefix(f"{self.base_id}:")
