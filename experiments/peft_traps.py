"""PEFT's prefix-tuning beside ours, trap by trap: the same slots, the same tiny random models, one slow referee.

    python experiments/peft_traps.py

No download, seconds on one core. What is right is computed by neither side: by full passes (`referee.py`), or, where
slots are a text's keys and values, by the bare model that reads the text in context.

Writes `results/peft_traps.json` and `.md`. A run under another transformers adds PEFT's column for it:

    pip install --no-deps --target other transformers==5.23.0
    PYTHONPATH=other python experiments/peft_traps.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from typing import Any, TypedDict

import torch
import transformers
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import PreTrainedModel

from antefix.attach import attached
from antefix.attention import reference
from antefix.sites import find_sites

from units import ROOT, commit, made_with  # isort: skip
from verdicts import Case, examined, table  # isort: skip
from referee import (  # isort: skip
    BEAMS, LENGTH, P, ROWS, START, WINDOW, Build, Slots, Values, Work, beam_search, builder, greedy, our_prefix,
    peft_model, placed, random_slots, referee, some_ids, text_slots, with_antefix, with_peft, writing,
)  # fmt: skip

RESULTS = ROOT / "results" / "peft_traps"


class Sides(TypedDict):
    peft: Callable[[], Values]
    antefix: Callable[[], Values]


def both(build: Build, slots: Slots, work: Work) -> Sides:
    """The same work on either side, for a model without a separate encoder."""
    return {"peft": with_peft(build, slots, work), "antefix": with_antefix(build, slots, work)}


def reading(ids: Tensor, **options: Any) -> Work:
    """Logits of a forward pass."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    return lambda model: {"logits": model(**batch).logits}


# --- the traps ----------------------------------------------------------------------------------------------


def forward_pass() -> Iterator[Case]:
    for name, trap in (
        ("Llama", "forward pass"), ("GPT-2", "forward pass"), ("Gemma 2", "forward pass, soft caps"),
        ("Gemma 4", "forward pass, heads of two widths"),
    ):  # fmt: skip
        build, ids = builder(name), some_ids(1)
        slots = random_slots(build)
        yield Case(
            trap=trap, model=name, right="one softmax over slots and tokens",
            wanted={"logits": referee(build, [slots] * ROWS)(ids)},
            bare={"logits": referee(build, [None] * ROWS)(ids)}, **both(build, slots, reading(ids)),
        )  # fmt: skip
    for name in ("Llama", "GPT-2", "Gemma 2"):
        build, whole = builder(name), behind_a_text(some_ids(2))
        rest, slots = whole[:, P:], text_slots(build, whole[:1, :P])
        yield Case(
            trap="a text's keys and values as slots", model=name, right="the bare model reading that text in context",
            wanted={"logits": build()(whole, use_cache=False).logits[:, P:]},
            bare={"logits": build()(rest).logits}, **both(build, slots, reading(rest)),
        )  # fmt: skip


def behind_a_text(rest: Tensor) -> Tensor:
    """The same P tokens before every row."""
    return torch.cat([some_ids(13, 1, P).expand(len(rest), -1), rest], dim=1)


def training() -> Iterator[Case]:
    for name in ("Llama", "GPT-2"):
        build = builder(name)
        slots = random_slots(build)
        wanted, bare = right_step(build, slots), right_step(build, None)

        def checkpointed(build: Build = build) -> PreTrainedModel:
            model = build()
            model.gradient_checkpointing_enable()
            return model

        for trap, made, late, options in (
            ("training", build, False, {}),
            ("training, use_cache=False", build, False, {"use_cache": False}),
            ("training, gradient checkpointing switched on first", checkpointed, False, {}),
            ("training, gradient checkpointing switched on last", build, True, {}),
        ):
            yield Case(
                trap=trap, model=name, right="loss and slots' gradient of a full pass", wanted=wanted, bare=bare,
                peft=lambda m=made, t=late, o=options, s=slots: peft_step(m, s, t, o),
                antefix=lambda m=made, t=late, o=options, s=slots: our_step(m, s, t, o),
            )  # fmt: skip


def right_step(build: Build, slots: Slots | None) -> Values:
    ids = some_ids(6)
    matrix = None if slots is None else slots["self"].clone().requires_grad_()
    row: Slots | None = None if matrix is None else {"self": matrix}
    with torch.enable_grad():
        logits = referee(build, [row] * ROWS)(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if matrix is None:
        return {"loss": loss.detach()}
    (gradient,) = torch.autograd.grad(loss, matrix)
    return {"loss": loss.detach(), "gradient": gradient}


def step(model: Any, late: bool, options: dict[str, Any]) -> Tensor:
    """Forward and backward, in training mode; the loss."""
    ids = some_ids(6)
    model.train()
    if late:
        model.gradient_checkpointing_enable()
    with torch.enable_grad():
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **options).loss
        loss.backward()
    return loss.detach()


def peft_step(build: Build, slots: Slots, late: bool, options: dict[str, Any], task: str = "CAUSAL_LM") -> Values:
    model = peft_model(build, {"default": slots["self"]}, task)
    loss = step(model, late, options)
    return {"loss": loss, "gradient": model.prompt_encoder["default"].embedding.weight.grad}


def our_step(build: Build, slots: Slots, late: bool, options: dict[str, Any], **positions: Any) -> Values:
    model = build().requires_grad_(False)
    module = our_prefix(model, slots, **positions).requires_grad_(True)
    with attached(model, module):
        loss = step(model, late, options)
    gradients = [t.grad for pair in module.slots().values() for t in pair]
    return {"loss": loss, "gradient": torch.cat([g.transpose(0, 1).flatten(1) for g in gradients if g is not None], 1)}


def decoding() -> Iterator[Case]:
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "no cache": {"use_cache": False},
    }
    for name in ("Llama", "GPT-2"):
        build, ids = builder(name), some_ids(3)
        slots = random_slots(build)
        wanted = {"ids": greedy(referee(build, [slots] * ROWS), ids)}
        bare = {"ids": greedy(referee(build, [None] * ROWS), ids)}
        for way, options in ways.items():
            yield Case(
                trap=f"generation, {way}", model=name, right="every token by a full pass", wanted=wanted, bare=bare,
                **both(build, slots, writing(ids, **options)),
            )  # fmt: skip


def prompt_lookup() -> Iterator[Case]:
    ids = some_ids(4, ROWS, 6).repeat(1, 3)

    def work(model: Any) -> Values:
        rows = [writing(row, prompt_lookup_num_tokens=3)(model)["ids"] for row in ids.split(1)]
        return {"ids": torch.cat(rows)}

    for name in ("Llama", "GPT-2"):  # the latter repeats itself, so that guesses come true
        build = builder(name)
        slots = random_slots(build)
        yield Case(
            trap="generation, prompt lookup", model=name, right="every token by a full pass",
            wanted={"ids": greedy(referee(build, [slots] * ROWS), ids)},
            bare={"ids": greedy(referee(build, [None] * ROWS), ids)}, **both(build, slots, work),
        )  # fmt: skip


def beams() -> Iterator[Case]:
    build, ids = builder("Llama"), some_ids(5)
    slots = random_slots(build)
    yield Case(
        trap=f"generation, {BEAMS} beams", model="Llama", right="beam search by full passes, each row alone",
        wanted={"ids": torch.cat([beam_search(referee(build, [slots]), row) for row in ids.split(1)])},
        bare={"ids": torch.cat([beam_search(referee(build, [None]), row) for row in ids.split(1)])},
        **both(build, slots, writing(ids, num_beams=BEAMS)),
    )  # fmt: skip


def left_padding() -> Iterator[Case]:
    build, ids, gaps = builder("Llama"), some_ids(7), torch.arange(ROWS)
    slots = random_slots(build)
    mask = (torch.arange(LENGTH) >= gaps[:, None]).long()
    counted = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    alone = [row[:, gap:] for row, gap in zip(ids.split(1), gaps.tolist(), strict=True)]
    right = "each row alone, without padding"

    def by_rows(row_slots: Slots | None, first: int = P) -> Values:
        logits = referee(build, [row_slots], first)
        return {"logits": torch.cat([logits(row)[0] for row in alone])}

    def padded(**options: Tensor) -> Work:
        work = reading(ids * mask, attention_mask=mask, **options)
        return lambda model: {"logits": work(model)["logits"][mask.bool()]}

    ways: dict[str, dict[str, Tensor]] = {"mask alone": {}, "mask and position_ids": counted}
    for way, options in ways.items():
        yield Case(
            trap=f"left padding, forward pass, {way}", model="Llama", right=right, wanted=by_rows(slots),
            bare=by_rows(None), **both(build, slots, padded(**options)),
        )  # fmt: skip
    for way, options in ways.items():
        yield Case(
            trap=f"left padding, forward pass, {way}, tokens count from 0", model="Llama", right=right,
            wanted=by_rows(slots, 0), bare=by_rows(None, 0), peft=None,
            antefix=with_antefix(build, slots, padded(**options), "in_place"),
        )  # fmt: skip
    yield Case(
        trap="left padding, generation", model="Llama", right=right,
        wanted={"ids": torch.cat([greedy(referee(build, [slots]), row) for row in alone])},
        bare={"ids": torch.cat([greedy(referee(build, [None]), row) for row in alone])},
        **both(build, slots, writing(ids * mask, mask)),
    )  # fmt: skip


def sliding_window() -> Iterator[Case]:
    build, ids = builder("Mistral"), some_ids(8)
    slots, right = random_slots(build), f"every token sees the slots, and {WINDOW} tokens"
    wanted, bare = referee(build, [slots] * ROWS), referee(build, [None] * ROWS)
    yield Case(
        trap="sliding window, forward pass", model="Mistral", right=right, wanted={"logits": wanted(ids)},
        bare={"logits": bare(ids)}, **both(build, slots, reading(ids)),
    )  # fmt: skip
    yield Case(
        trap="sliding window, generation", model="Mistral", right=right, wanted={"ids": greedy(wanted, ids)},
        bare={"ids": greedy(bare, ids)}, **both(build, slots, writing(ids)),
    )  # fmt: skip
    rest, model = some_ids(9, ROWS, 3), build()
    whole = behind_a_text(rest)
    slots = text_slots(build, whole[:1, :P])
    right = "the bare model reading that text in context: slots leave the window"
    yield Case(
        trap="sliding window, a text's keys and values as slots, forward pass", model="Mistral", right=right,
        wanted={"logits": model(whole, use_cache=False).logits[:, P:]}, bare={"logits": model(rest).logits},
        **both(build, slots, reading(rest)),
    )  # fmt: skip
    yield Case(
        trap="sliding window, a text's keys and values as slots, generation", model="Mistral", right=right,
        wanted={"ids": greedy(lambda ids: model(ids, use_cache=False).logits, whole)},
        bare={"ids": greedy(lambda ids: model(ids, use_cache=False).logits, rest)},
        **both(build, slots, writing(rest)),
    )  # fmt: skip


def mixed() -> Iterator[Case]:
    build, ids, names = builder("Llama"), some_ids(10), ["one", "other", "one", "other"]
    one, other = random_slots(build, 0), random_slots(build, 1)

    def under_peft(work: Work) -> Callable[[], Values]:
        return lambda: work(peft_model(build, {"one": one["self"], "other": other["self"]}))

    def under_ours(work: Work) -> Callable[[], Values]:
        def run() -> Values:
            model = build()
            with attached(model, our_prefix(model, one), our_prefix(model, other), rows=[0, 1, 0, 1]):
                return work(model)

        return run

    wanted = referee(build, [{"one": one, "other": other}[name] for name in names])
    bare, first = referee(build, [None] * ROWS), referee(build, [one] * ROWS)
    right = "each row alone under its own prefix"
    yield Case(
        trap="two prefixes in one batch, forward pass", model="Llama", right=right, wanted={"logits": wanted(ids)},
        bare={"logits": bare(ids)}, others={"as if every row had the first": {"logits": first(ids)}},
        peft=under_peft(reading(ids, adapter_names=names)), antefix=under_ours(reading(ids)),
    )  # fmt: skip
    yield Case(
        trap="two prefixes in one batch, generation", model="Llama", right=right, wanted={"ids": greedy(wanted, ids)},
        bare={"ids": greedy(bare, ids)}, others={"as if every row had the first": {"ids": greedy(first, ids)}},
        peft=under_peft(writing(ids, adapter_names=names)), antefix=under_ours(writing(ids)),
    )  # fmt: skip


_SEQ2SEQ = "SEQ_2_SEQ_LM"


def encoder_decoder() -> Iterator[Case]:
    for name in ("BART", "T5"):
        yield from slots_everywhere(f"{name}, 4 layers")
        yield from decoder_text(f"{name}, 3 layers")


def slots_everywhere(name: str) -> Iterator[Case]:
    build, source, target = builder(name), some_ids(11), some_ids(12, ROWS, 4)
    slots, model, start = random_slots(build), build(), torch.full((ROWS, 1), START)

    def right(row: Slots | None, ids: Tensor) -> Any:
        with reference.at_work(model, placed(model, [row] * ROWS)):
            return model(input_ids=source, decoder_input_ids=ids, use_cache=False)

    def values(found: Any) -> Values:
        return {"encoder": found.encoder_last_hidden_state, "logits": found.logits}

    work: Work = lambda model: values(model(input_ids=source, decoder_input_ids=target))  # noqa: E731
    words, handed = "the encoder, the decoder and the cross-attention have slots of their own", slots_handed_out(build)
    yield Case(
        trap="encoder-decoder, forward pass", model=name, right=words, wanted=values(right(slots, target)),
        bare=values(right(None, target)), peft=with_peft(build, slots, work, _SEQ2SEQ),
        antefix=with_antefix(build, slots, work, "in_place"),
        note=f"PEFT hands slots of layers {handed} of its matrix to decoder layers 0 to {len(handed) - 1}, and none to "
        "the encoder and the cross-attention",
    )  # fmt: skip
    yield Case(
        trap="encoder-decoder, generation", model=name, right=words,
        wanted={"ids": greedy(lambda ids: right(slots, ids).logits, start)},
        bare={"ids": greedy(lambda ids: right(None, ids).logits, start)},
        peft=with_peft(build, slots, writing(source), _SEQ2SEQ),
        antefix=with_antefix(build, slots, writing(source), "in_place"),
    )  # fmt: skip
    decoder: Slots = {"self": slots["self"]}
    yield Case(
        trap="encoder-decoder, training", model=name, right="every slot of the decoder gets a gradient",
        wanted={"reached": torch.ones(2 * len(handed), dtype=torch.bool)}, bare={},
        peft=lambda: reached(peft_step(build, decoder, False, {}, _SEQ2SEQ), len(handed)),
        antefix=lambda: reached(our_step(build, decoder, False, {}, positions="in_place"), len(handed)),
    )  # fmt: skip


def reached(values: Values, layers: int) -> Values:
    """Which of the keys and values of the layers get a gradient."""
    return {"reached": torch.stack([part.abs().max() > 0 for part in values["gradient"].chunk(2 * layers, dim=1)])}


def slots_handed_out(build: Build) -> list[int]:
    """The layer of PEFT's matrix whose slots a layer of the decoder gets."""
    layers = len(find_sites(build()).of_kinds(("self",)))
    parts = random_slots(build)["self"].chunk(layers, dim=1)
    numbered = torch.cat([torch.full_like(part, n) for n, part in enumerate(parts)], dim=1)
    prompt = peft_model(build, {"default": numbered}, _SEQ2SEQ).get_prompt(1)
    assert prompt.cross_attention_cache.get_seq_length() == 0
    return [int(layer.keys.max()) for layer in prompt.self_attention_cache.layers]


def decoder_text(name: str) -> Iterator[Case]:
    build, source = builder(name), some_ids(11, 1)
    model, whole = build(), behind_a_text(torch.cat([torch.tensor([[START]]), some_ids(14, 1, 4)], dim=1))
    slots, rest = text_slots(build, whole[:, :P], source), whole[:, P:]
    # In the order in which PEFT will hand them out.
    parts, order = slots["self"].chunk(3, dim=1), slots_handed_out(build)
    for_peft: Slots = {"self": torch.cat([parts[order.index(n)] for n in range(3)], dim=1)}

    def bare(ids: Tensor) -> Tensor:
        return model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits

    work: Work = lambda model: {"logits": model(input_ids=source, decoder_input_ids=rest).logits}  # noqa: E731
    yield Case(
        trap="encoder-decoder, a decoder text's keys and values as slots", model=name,
        right="the bare model reading that text in context", wanted={"logits": bare(whole)[:, P:]},
        bare={"logits": bare(rest)}, peft=with_peft(build, for_peft, work, _SEQ2SEQ),
        antefix=with_antefix(build, slots, work, "in_place"),
        note=f"PEFT is given the layers of its matrix in the order in which it hands them out: {order}",
    )  # fmt: skip


def encoder_only() -> Iterator[Case]:
    for name, task, value in (
        ("BERT", "FEATURE_EXTRACTION", "last_hidden_state"), ("BERT, classifier", "SEQ_CLS", "logits")
    ):  # fmt: skip
        build, ids = builder(name), some_ids(15)
        slots, model = random_slots(build), build()
        positions = torch.arange(P, P + LENGTH)[None]

        def right(row: Slots | None, model: Any = model, value: str = value, positions: Tensor = positions) -> Values:
            with reference.at_work(model, placed(model, [row] * ROWS)):
                return {value: getattr(model(some_ids(15), position_ids=positions), value)}

        work: Work = lambda model, v=value, i=ids: {  # noqa: E731
            v: getattr(model(input_ids=i, attention_mask=torch.ones_like(i)), v)
        }
        yield Case(
            trap="encoder alone", model=name, right="one softmax over slots and tokens", wanted=right(slots),
            bare=right(None), peft=with_peft(build, slots, work, task), antefix=with_antefix(build, slots, work),
        )  # fmt: skip


TRAPS: tuple[Callable[[], Iterator[Case]], ...] = (
    forward_pass, training, decoding, prompt_lookup, beams, left_padding, sliding_window, mixed, encoder_decoder,
    encoder_only,
)  # fmt: skip


def is_supported(version: str) -> bool:
    """Whether Antefix is made for this transformers."""
    wanted = next(r for r in map(Requirement, requires("antefix") or ()) if r.name == "transformers")
    return wanted.specifier.contains(version)


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    version = transformers.__version__
    with torch.no_grad():
        rows = [examined(case, is_supported(version)) for trap in TRAPS for case in trap()]
    path = RESULTS.with_suffix(".json")
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs[version] = {"commit": commit(), "made_with": {**made_with(), "transformers": version}, "rows": rows}
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    written = table(runs)
    RESULTS.with_suffix(".md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
