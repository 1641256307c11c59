"""`antefix links`: how well a prefix tells true triples of a graph from false ones."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from antefix.cli.output import BaseOfPrefix, Device, Json, Precision, console, print_json
from antefix.errors import CommandError


def links(
    prefix: Annotated[Path, typer.Option("--prefix", "-p", help="A kept prefix, trained with `task = 'triples'`.")],
    test: Annotated[str, typer.Option(metavar="FILE", help="The triples to rank and to classify.")],
    dev: Annotated[str, typer.Option(metavar="FILE", help="The triples that the threshold is chosen on.")],
    known: Annotated[
        list[str] | None,
        typer.Option(
            "--known", metavar="FILE", help="Other true triples (the training set's), left out of the ranking."
        ),
    ] = None,
    base: BaseOfPrefix = None,
    dtype: Precision = "float32",
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Triples read together.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Rank only so many of the test triples, drawn.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --limit's draw, and of the false triples to classify.")] = 0,
    record: Annotated[bool, typer.Option("--record", help="Write the scores onto the prefix's card.")] = False,
    as_json: Json = False,
) -> None:
    """Link prediction and triple classification with a prefix.

    Every true triple of the test set is ranked among all entities, for its head and for its tail, without those that
    are known to be true: mean rank (MR), mean reciprocal rank (MRR), Hits@1, 3 and 10. Then test triples, and as many
    false ones where the file has none, are told apart by a threshold that is chosen on the dev set.

    Example: `antefix links -p bank/umls --test test.tsv --dev dev.tsv --known train.tsv --limit 100`
    """
    from antefix.attach import attached
    from antefix.cli.progress import LiveLine
    from antefix.data import read
    from antefix.link_prediction import classification_scores, likelihoods, link_scores
    from antefix.prefix import Prefix
    from antefix.tasks.triples import TriplesTask, is_true, true_triples, with_one_negative

    kept = Prefix.load(prefix)
    if not isinstance(kept.card.task, TriplesTask):
        raise CommandError(f'{prefix} was not trained on triples (task = "triples"): it cannot tell true from false')
    tests, devs = read(test), read(dev)
    others = [*devs, *(example for file in known or () for example in read(file))]
    ranked = [e for e in tests if is_true(e)]
    if limit is not None:
        ranked = random.Random(f"links-{seed}").sample(ranked, min(limit, len(ranked)))
    # Filtered by the whole test set, whatever part of it is ranked.
    every = set(true_triples([*tests, *others]))
    loaded = kept.card.base.load(base, dtype=dtype, device=device)
    likelihood = partial(likelihoods, loaded, batch_size=batch_size)
    with attached(loaded.model, kept):
        with LiveLine(console(), len(ranked), "triple") as line:
            scores = link_scores(likelihood, ranked, [*tests, *others], lambda count: line.show(count, ""))
        told_apart = classification_scores(
            likelihood, *(with_one_negative(some, every, seed) for some in (devs, tests))
        )
    found = {"ranked": len(ranked), **scores, **told_apart}
    if record:
        kept.with_scores("links", found).save(prefix, overwrite=True)
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            typer.echo(f"{name:>14}  {value:.4f}" if isinstance(value, float) else f"{name:>14}  {value}")
