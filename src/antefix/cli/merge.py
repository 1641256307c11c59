"""`antefix merge`: a prefix written into the weights of a copy of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antefix.cli.output import console


def merge(
    prefix: Annotated[Path, typer.Argument(help="The folder of a kept prefix.")],
    out: Annotated[Path, typer.Option(help="Where the model goes: a folder as transformers loads it.")],
    base: Annotated[str | None, typer.Option(help="The base; without: the one that the card names.")] = None,
) -> None:
    """Write a prefix into the weights of a copy of its base: (IA)^3, LoRA, BitFit, trained weights.

    What comes out is an ordinary model in float32 that needs no Antefix, as fast as the base. Slots cannot be written
    into weights.

    Example: `antefix merge bank/menus --out menus-model`
    """
    from antefix import atomic
    from antefix.errors import CommandError
    from antefix.merge import merged
    from antefix.prefix import Prefix

    if out.exists():
        raise CommandError(f"{out} exists: give another --out")
    kept = Prefix.load(prefix)
    screen = console()
    with screen.status("writing the weights"):
        made = merged(kept.card.base.load(base), kept)
        with atomic.new_folder(out) as scratch:
            made.model.save_pretrained(scratch)
            made.tokenizer.save_pretrained(scratch)
    screen.print(f"{out}: {made.name}", highlight=False, soft_wrap=True)
