"""`antefix cartridge`: a document becomes a prefix that answers as if it were in context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antefix.cli.output import Json, Precision, console, print_json
from antefix.errors import CommandError

if TYPE_CHECKING:
    from antefix.prefix import Prefix


def cartridge(
    document: Annotated[Path, typer.Argument(help="A text file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the kept prefix.")],
    base: Annotated[str, typer.Option(help="A chat model: `smollm2-135m`, a hub id or a folder.")] = "smollm2-135m",
    slots: Annotated[int, typer.Option(min=1, help="Slots a site: no more than the document has tokens.")] = 256,
    conversations: Annotated[int, typer.Option(min=2, help="Questions and answers of self-study.")] = 128,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often each conversation is seen.")] = 2.0,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Without: the method's default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions, and of the order of training.")] = 0,
    dtype: Precision = "native",
    run: Annotated[Path | None, typer.Option(help="The run's folder; without: runs/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Train a cartridge: the base studies the document by asking itself, and the slots learn what it answers.

    Interrupted, the same command goes on: with the next conversation, or from the last checkpoint.

    Example: `antefix cartridge handbook.txt --output bank/handbook --slots 256`
    """
    from antefix.base import load_base
    from antefix.cli.progress import LiveLine, TrainingProgress, clock
    from antefix.cli.stopping import stop_after_step
    from antefix.methods.cartridge import CartridgeConfig
    from antefix.processes import check_alone, device
    from antefix.self_study import Study
    from antefix.settings import validated
    from antefix.training.cartridge import CartridgeRun, train_cartridge
    from antefix.training.checkpoint import CHECKPOINT_FILE
    from antefix.training.recipe import TrainingRecipe

    check_alone("a cartridge's self-study")
    if output.exists():
        raise CommandError(f"{output} exists: give another --output")
    folder = run or Path("runs") / output.name
    said = {"epochs": epochs, "seed": seed, "learning_rate": learning_rate}
    training = validated(TrainingRecipe, {**said, "pairs_per_step": 8, "evaluations": 4})
    config = validated(CartridgeConfig, {"num_virtual_tokens": slots, "document": str(document)})
    settings = CartridgeRun(
        document=str(document), config=config, conversations=conversations, study=Study(seed=seed), training=training
    )
    out = console()
    loaded = load_base(base, dtype=dtype, device=str(device()))
    with (
        stop_after_step() as stop_requested,
        LiveLine(out, conversations, "conversation") as line,
        TrainingProgress(out) as progress,
    ):

        def studied(done: int, seconds_left: float) -> None:
            line.show(min(done, conversations), f"self-study  {clock(seconds_left)} left")

        prefix = train_cartridge(
            loaded, settings, folder, studied=studied, watch=progress, stop_requested=stop_requested
        )
    prefix.save(output)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    if as_json:
        facts = {name: prefix.card.training[name] for name in ("conversations", "steps", "kept_step", "seconds")}
        kept = {"prefix": str(output), "run": str(folder), "bytes": prefix.num_bytes, "dev": prefix.card.scores["dev"]}
        print_json(kept | facts)
    else:
        typer.echo(_told(prefix, output, folder))


def _told(prefix: Prefix, output: Path, folder: Path) -> str:
    facts = prefix.card.training
    return (
        f"kept {output} ({prefix.num_bytes / 1024:,.0f} KiB, {facts['conversations']} conversations, step "
        f"{facts['kept_step']} of {facts['steps']}); conversations are in {folder}"
    )
