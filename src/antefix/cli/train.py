"""`antefix train`: from a recipe to a kept prefix, with a live line and an exact resume."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json
from antefix.cli.stopping import stop_after_step

if TYPE_CHECKING:
    from antefix.prefix import Prefix
    from antefix.training.prepared import Prepared
    from antefix.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a TOML file; `antefix init FILE` writes a first one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an unfinished run and start anew.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the kept prefix of this name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a prefix as a recipe says, and keep it in its bank.

    An interrupted run (Ctrl-C, a crash, a power cut) goes on where its last checkpoint was when the same command
    is given again, and ends with the same bits.

    Example: `antefix train menus.toml training.epochs=3 config.num_virtual_tokens=20`
    """
    from antefix import processes
    from antefix.cli.progress import TrainingProgress
    from antefix.training.prepared import prepare_recipe
    from antefix.training.recipe import load_recipe
    from antefix.training.run import check_name_is_free, forget, is_unfinished, run_recipe

    with processes.failing_together():
        loaded = load_recipe(recipe, overrides or [])
        check_name_is_free(loaded, overwrite)
        prepared = prepare_recipe(loaded)
    speaks = processes.is_main()
    out = console(quiet=not speaks)
    going_on = is_unfinished(loaded.run_folder) and not restart
    for line in _plan(prepared):
        out.print(line, highlight=False)
    if going_on:
        out.print(f"going on from the checkpoint in {loaded.run_folder}", highlight=False)
    if dry_run:
        if as_json and speaks:
            print_json(_plan_facts(loaded, prepared) | {"going_on": going_on})
        return
    with processes.failing_together():  # nobody looks for the checkpoint before it is gone
        if restart and speaks:
            forget(loaded.run_folder)
    with stop_after_step(speaks=speaks) as stop_requested, TrainingProgress(out) as progress:
        prefix = run_recipe(loaded, prepared, progress, stop_requested=stop_requested, overwrite=overwrite)
    processes.leave()
    if speaks:
        _report(loaded, prefix, as_json)


def _report(recipe: Recipe, prefix: Prefix, as_json: bool) -> None:
    training = prefix.card.training
    result: dict[str, Any] = {
        "prefix": str(recipe.prefix_folder),
        "run": str(recipe.run_folder),
        "bytes": prefix.num_bytes,
        "values": prefix.num_values,
        "steps": training["steps"],
        "kept_step": training["kept_step"],
        "seconds": training["seconds"],
        "dev": prefix.card.scores["dev"],
    }
    if as_json:
        print_json(result)
        return
    typer.echo(
        f"kept {recipe.prefix_folder} ({prefix.num_bytes / 1024:,.0f} KiB, step {training['kept_step']} of "
        f"{training['steps']}, {training['seconds']:,.0f} s); log and curve in {recipe.run_folder}"
    )
    options = ({} if recipe.data.format is None else {"format": recipe.data.format}) | recipe.data.reader
    reader = "".join(f" --reader {shlex.quote(f'{key}={_word(value)}')}" for key, value in options.items())
    console().print(
        f"next: antefix generate --prefix {recipe.prefix_folder} --input FILE --output texts.jsonl{reader}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _word(value: Any) -> str:
    """As `--reader` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _plan_facts(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    return {
        "prefix": str(recipe.prefix_folder),
        "run": str(recipe.run_folder),
        "base": prepared.base.name,
        "method": prepared.method,
        "num_virtual_tokens": prepared.module.num_virtual_tokens,
        **({} if prepared.module.is_searched else {"learning_rate": prepared.learning_rate}),
        "pairs": prepared.train_set.pairs_of_epoch,
        "dev_pairs": prepared.dev_set.num_pairs,
        "steps": prepared.num_steps,
    }


def _plan(prepared: Prepared) -> list[str]:
    train_set, dev_set, training = prepared.train_set, prepared.dev_set, prepared.training
    if prepared.module.is_searched:
        pace = f"step size {prepared.module.step_size:g}"
        length = f"{prepared.num_steps:,} generations of {training.black_box.population} candidates"
    else:
        pace = f"learning rate {prepared.learning_rate:g}"
        length = f"{prepared.num_steps:,} steps of {training.pairs_per_step} pairs"
    lines = [
        f"base {prepared.base.name}, method {prepared.method}, {prepared.module.num_virtual_tokens} slots, {pace}",
        f"data {train_set.pairs_of_epoch:,} pairs of {len(train_set.of_epoch(0)):,} sources; "
        f"dev {dev_set.num_pairs:,} pairs of {len(dev_set.examples):,}; {length}",
    ]
    for encoded, name in ((train_set, "training"), (dev_set, "dev")):
        for count, what in ((encoded.truncated_sources, "sources"), (encoded.truncated_targets, "targets")):
            if count:
                lines.append(f"cut to the limit: {count:,} {what} of the {name} set")
    return lines
