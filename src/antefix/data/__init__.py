"""From files to examples, from examples to batches. Knows nothing of prefixes."""

from antefix.data.example import Chat, Example, Message, Source, Table, Triples, Words
from antefix.data.readers import READERS, read
from antefix.data.sample import sample_frames, sample_pairs, split_examples

__all__ = [
    "READERS",
    "Chat",
    "Example",
    "Message",
    "Source",
    "Table",
    "Triples",
    "Words",
    "read",
    "sample_frames",
    "sample_pairs",
    "split_examples",
]
