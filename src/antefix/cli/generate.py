"""`antefix generate`: texts from one source, from standard input, or from a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import BaseOfPrefix, Device, Json, Precision, ReaderOptions, console, print_json
from antefix.errors import CommandError

if TYPE_CHECKING:
    from antefix.base import Base, Dtype
    from antefix.data import Example
    from antefix.data.linearise import TextFormat
    from antefix.decoding import Decoding
    from antefix.prefix import BaseRecord, Card, Prefix

    Each = Callable[[Sequence[Example]], Iterator[tuple[int, str]]]
    """Texts or labels of sources, as they are done."""


def generate(
    source: Annotated[
        str | None,
        typer.Argument(help="One source: `name[Fern Hill], food[French]`, `name: Fern Hill`, or plain text."),
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option("--prefix", "-p", help="A kept prefix; without: the bare base that --base names.")
    ] = None,
    prefix_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="A column of the file that names each row's prefix; empty: the bare base."),
    ] = None,
    bank: Annotated[Path, typer.Option(help="The bank of the prefixes that rows name.")] = Path("bank"),
    resident_mib: Annotated[int, typer.Option(min=1, help="Memory for the prefixes that rows name, in MiB.")] = 256,
    input_file: Annotated[
        str | None, typer.Option("--input", "-i", help="A data file; every source gets a text.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data file.")] = None,
    reader: ReaderOptions = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Texts go here, `.jsonl` or one a line; resumes.")
    ] = None,
    base: BaseOfPrefix = None,
    dtype: Precision = "float32",
    device: Device = "auto",
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A decoding option, such as `num_beams=5` or `do_sample=true`."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="KEY=VALUE", help="A change to the text format, such as `chat=true`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sources decoded together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many sources.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a text for every source, with a prefix (or with the bare base).

    One source from the command line or standard input is printed, word by word on a terminal (with one
    beam); the sources of a file go to an output file, and an interrupted command goes on where it stopped.

    Examples:

    `antefix generate "name: Fern Hill | price: £20" -p bank/menus`

    `antefix generate -p bank/menus -i menus.csv -o texts.jsonl --set num_beams=5`

    `antefix generate --prefix-column customer_prefix -i orders.csv -o texts.jsonl`
    """
    from antefix.attach import attached
    from antefix.cli.bulk import prepare_bulk
    from antefix.decoding import Decoding
    from antefix.generation import generate_each
    from antefix.labels import label_each
    from antefix.prefix import Prefix
    from antefix.settings import override, validated

    how = override({} if split is None else {"split": split}, reader or [])
    if prefix_column is not None:
        if prefix is not None or source is not None or input_file is None:
            raise CommandError("--prefix-column is for a file of sources alone: give --input, and no --prefix")
        _require_output(output)
        bulk = prepare_bulk(input_file, how, prefix_column, bank, base, decoding or [], text or [], limit)
        _say_unknown_fields(bulk.sources, bulk.cards)
        loaded = _base(bulk.base, base, dtype, device)
        answers = partial(
            bulk.answers, loaded, resident_bytes=resident_mib << 20, batch_size=batch_size, on_cut=_say_cut
        )
        names = [writer.name for writer in bulk.writers]
        _write_many(answers, bulk.sources, [loaded.fingerprint, *bulk.decides], output, overwrite, as_json, names)
        return
    kept = None if prefix is None else Prefix.load(prefix)
    if kept is None and base is None:
        raise CommandError("say which prefix (--prefix FOLDER), or which bare base (--base smollm2-135m)")
    if input_file is None and output is not None:
        raise CommandError("--output is for what a file's sources get: give the file with --input")
    if input_file is not None and (kept is None or kept.card.task.writes_text):
        _require_output(output)
    examples, text_format = _sources(source, input_file, how, kept, text or [])
    examples = examples[:limit]
    _say_unknown_fields(examples, repeat(None if kept is None else kept.card))
    options = override(dict(_default_decoding(kept, examples)), decoding or [])
    chosen = validated(Decoding, options, "decoding option ")
    loaded = _base(None if kept is None else kept.card.base, base, dtype, device)
    with nullcontext() if kept is None else attached(loaded.model, kept):
        if kept is not None and not kept.card.task.writes_text:
            each = partial(label_each, loaded, text_format=text_format, batch_size=batch_size)
            if output is None:
                _print_labels(each, examples, as_json)
                return
        elif input_file is None:
            _print_one(loaded, examples, text_format, chosen, as_json)
            return
        else:
            each = partial(
                generate_each, loaded, text_format=text_format, decoding=chosen, batch_size=batch_size, on_cut=_say_cut
            )
        decides = [loaded.fingerprint, text_format.model_dump_json(), chosen.model_dump_json()]
        decides += [repr([e.asked for e in examples]), "" if kept is None else kept.card.model_dump_json()]
        chosen_each = each

        def answers_of(left: list[int]) -> Iterator[tuple[int, str]]:
            return chosen_each([examples[n] for n in left])

        _write_many(answers_of, examples, decides, output, overwrite, as_json)


def _base(of_prefix: BaseRecord | None, given: str | None, dtype: Dtype, device: str) -> Base:
    from antefix.base import load_base

    if of_prefix is None:
        return load_base(given or "", dtype=dtype, device=device)
    return of_prefix.load(given, dtype=dtype, device=device)


def _require_output(output: Path | None) -> Path:
    if output is None:
        raise CommandError("say where the texts go: --output texts.jsonl (or .txt, one text a line)")
    if str(output) == "-":
        raise CommandError("--output takes a file: an interrupted command goes on with what it holds")
    return output


def _sources(
    source: str | None, input_file: str | None, how: dict[str, Any], kept: Prefix | None, changes: list[str]
) -> tuple[list[Example], TextFormat]:
    from antefix.data import Example, read
    from antefix.data.linearise import TextFormat, default_format, parse_source
    from antefix.settings import override

    if input_file is not None:
        if source is not None:
            raise CommandError("give one source or --input FILE, not both")
        examples = read(input_file, **how)
        start = kept.card.text_format if kept is not None else default_format([e.source for e in examples]).to_dict()
        return examples, TextFormat.from_dict(override(dict(start), changes))
    text_format = TextFormat.from_dict(override(dict(kept.card.text_format if kept is not None else {}), changes))
    if source is None:
        if sys.stdin.isatty():
            raise CommandError("no source: give one as an argument, on standard input, or a file with --input")
        source = sys.stdin.read()
    return [Example(source=parse_source(source, text_format))], text_format


def _default_decoding(kept: Prefix | None, examples: list[Example]) -> dict[str, Any]:
    from antefix.generation import default_decoding

    if kept is not None:
        return kept.card.decoding
    return default_decoding(examples).model_dump(exclude_defaults=True)


def _say_unknown_fields(examples: Sequence[Example], cards: Iterable[Card | None]) -> None:
    """A field that was not in training is a slip most of the time: a misspelt column, or the answer itself.

    cards: of every example's prefix.
    """
    from antefix.data import Table

    unknown: dict[str, list[str]] = {}
    for example, card in zip(examples, cards, strict=False):
        known: list[str] = card.training.get("fields") or [] if card is not None else []
        if known and isinstance(example.source, Table):
            for field, _ in example.source.fields:
                if field not in known:
                    unknown.setdefault(field, known)
    for field, known in unknown.items():
        console().print(
            f"the prefix has not seen the field '{field}' in training ({', '.join(known)}); if it holds what is "
            f"to be written, say --reader target_column={field}",
            highlight=False, markup=False, style="yellow",
        )  # fmt: skip


def _say_cut(num_cut: int) -> None:
    console().print(
        f"cut to the text format's max_source_tokens: {num_cut:,} {'source' if num_cut == 1 else 'sources'}",
        highlight=False,
    )


def _print_labels(each: Each, examples: list[Example], as_json: bool) -> None:
    found = dict(each(examples))
    labels = [found[n] for n in range(len(examples))]
    if as_json:
        print_json({"labels": labels})
    else:
        typer.echo("\n".join(labels))


def _print_one(base: Base, examples: list[Example], text_format: TextFormat, decoding: Decoding, as_json: bool) -> None:
    from antefix.generation import generate, generate_each, terminal_streamer

    if sys.stdout.isatty() and not as_json and decoding.num_beams == 1:
        for _ in generate_each(
            base,
            examples,
            text_format=text_format,
            decoding=decoding,
            streamer=terminal_streamer(base),
            on_cut=_say_cut,
        ):
            pass
        return
    written = generate(base, examples, text_format=text_format, decoding=decoding, on_cut=_say_cut)[0]
    if as_json:
        print_json({"text": written})
    else:
        typer.echo(written)


def _write_many(
    answers_of: Callable[[list[int]], Iterator[tuple[int, str]]],
    examples: list[Example],
    decides: list[str],
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    prefixes: Sequence[str | None] | None = None,
) -> None:
    """Texts or labels into a file, going on where an interrupted command stopped.

    answers_of: makes those of these examples. decides: what they depend on. prefixes: of every example, where they
    differ.
    """
    from antefix.cli.progress import LiveLine, clock
    from antefix.generated_file import GeneratedFile
    from antefix.pace import Pace

    file = GeneratedFile(_require_output(output), decides, overwrite=overwrite)
    left = [n for n in range(len(examples)) if n not in file.texts]
    out = console()
    if file.texts:
        out.print(f"going on: {len(file.texts)} of {len(examples)} texts are there", highlight=False)
    pace = Pace(len(left))
    with LiveLine(out, len(examples), "text") as line:
        for index, written in answers_of(left) if left else ():
            file.add(left[index], written)
            pace.one_done()
            line.show(len(file.texts), f"{pace.per_second:.1f}/s  {clock(pace.seconds_left)} left")
    file.finish([e.where for e in examples], prefixes)
    if as_json:
        print_json({"output": str(output), "texts": len(examples), "seconds": round(pace.seconds, 1)})
    else:
        typer.echo(f"{len(examples)} texts in {output}")
