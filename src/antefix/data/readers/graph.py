"""Rows of a knowledge graph: triples of ids, a line each, whose texts stand in files beside it.

    acquired_abnormality<TAB>location_of<TAB>experimental_model_of_disease

`entity2text.txt` and `relation2text.txt` in the same folder hold an id and its text a line, as KG-BERT's data sets do
(UMLS, WN18RR, FB15k-237). A fourth column says whether the triple is true: `1`, or `-1`. There is no header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from antefix.data.readers.rows import Lines
from antefix.errors import DataError

ENTITIES, RELATIONS = "entity2text.txt", "relation2text.txt"
_LABELS = {"1": "true", "-1": "false"}


def is_graph(path: Path) -> bool:
    """Whether a file holds triples of ids: texts of entities stand beside it."""
    return path.suffix == ".tsv" and (path.parent / ENTITIES).is_file()


def graph_rows(path: Path, lines: Lines, text_lines: Callable[[Path], Lines]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, row)`, as the reader `triples` takes them. text_lines: opens the files beside it.

    Raises DataError naming file and line.
    """
    names = (ENTITIES, RELATIONS, ENTITIES)
    of_file = {name: _texts(path.parent / name, text_lines(path.parent / name)) for name in dict.fromkeys(names)}
    every = [of_file[name] for name in names]
    for line, text in lines:
        cells = text.rstrip("\r\n").split("\t")
        where = f"{path}, line {line}"
        if len(cells) not in (3, 4):
            raise DataError(f"{where}: head, relation and tail are needed, with tabs between; there are {len(cells)}")
        label = _LABELS.get(cells[3]) if len(cells) == 4 else "true"
        if label is None:
            raise DataError(f"{where}: the fourth column is 1 or -1, this is '{cells[3]}'")
        for cell, texts, name in zip(cells[:3], every, names, strict=True):
            if cell not in texts:
                raise DataError(f"{where}: '{cell}' has no text in {name}")
        triple = [texts[cell] for cell, texts in zip(cells[:3], every, strict=True)]
        yield line, {"triples": [triple], "label": label}


def _texts(path: Path, lines: Lines) -> dict[str, str]:
    """Id -> text. Raises DataError for two ids of one text: they could not be told apart."""
    texts: dict[str, str] = {}
    id_of: dict[str, str] = {}
    for line, content in lines:
        name, tab, text = content.partition("\t")
        text = text.strip()
        if not tab or not text:
            raise DataError(f"{path}, line {line}: an id and its text are needed, with a tab between")
        if (other := id_of.setdefault(text, name)) != name:
            raise DataError(f"{path}, line {line}: '{name}' has the text of '{other}': give them texts of their own")
        texts[name] = text
    return texts
