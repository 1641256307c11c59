"""`antefix doctor`: can this base carry a prefix, and where?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from antefix.cli.output import Device, Json, Precision, console, print_json

if TYPE_CHECKING:
    from antefix.doctor import Diagnosis, Proof


def doctor(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or `smollm2-135m`.")],
    dtype: Precision = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look where a base can carry a prefix, and prove it.

    Ends with 0 if it can, with 1 if it cannot, with the reason.

    Example: `antefix doctor smollm2-135m`
    """
    from antefix.base import load_base
    from antefix.doctor import examine

    with console().status(f"examining {model}"):
        diagnosis = examine(load_base(model, dtype=dtype, device=device))
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        for line in _report(diagnosis):
            typer.echo(line)
    if not diagnosis.can_carry_prefix:
        raise typer.Exit(1)


def _report(diagnosis: Diagnosis) -> list[str]:
    from antefix.doctor import sites_in_words

    lines = [f"{diagnosis.base}: {diagnosis.model}, {diagnosis.dtype}, attention '{diagnosis.attention}'"]
    if diagnosis.sites is None:
        return [*lines, f"no prefix: {diagnosis.refusal}"]
    sites = diagnosis.sites
    values = sum(s.num_key_value_heads * (s.key_width + s.value_width) for s in sites.attention)
    lines += [
        f"positions: {sites.positions}",
        f"sites: {len(sites.attention)}; a slot at all of them is {values:,} values",
    ]
    lines += [f"  {line}" for line in sites_in_words(sites)]
    lines += ["proofs:", *(f"  {_in_words(proof)}" for proof in diagnosis.proofs)]
    verdict = "can carry a prefix" if diagnosis.can_carry_prefix else "no prefix: a proof failed"
    return [*lines, f"{diagnosis.base}: {verdict}"]


def _in_words(proof: Proof) -> str:
    if proof.passed is None:
        return f"{'-':<7} {proof.name:<11} {proof.claim.partition(';')[0]} (does not apply: {proof.reason})"
    outcome = "passed" if proof.passed else "FAILED"
    reason = f"; {proof.reason}" if proof.reason else ""
    return f"{outcome:<7} {proof.name:<11} {proof.claim}: {proof.measured:.2g}, allowed {proof.tolerance:.2g}{reason}"
