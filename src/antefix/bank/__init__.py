"""A bank: a folder of kept prefixes, each under its own name. Knows files and fingerprints; trains nothing.

`folder` has the bank itself, `entry` one line of its list, `query` what a list may be asked for, `index` where lists
come from, `lineage` which prefix was made from which, `archive` a bank in one file.
"""

from antefix.bank.entry import Entry
from antefix.bank.folder import Bank
from antefix.bank.query import MOST_TEXT, Page, Query

__all__ = ["MOST_TEXT", "Bank", "Entry", "Page", "Query"]
