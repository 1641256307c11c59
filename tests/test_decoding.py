"""However a text is decoded, with whatever cache: every token is the one a full forward pass would choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    CONTEXT,
    DECODER_ONLY,
    ENCODER_DECODER,
    ENCODER_ONLY,
    UNLIKE,
    tell_sources,
    tiny_base,
    tiny_batch,
    tiny_method,
    tiny_pair,
)  # fmt: skip
from torch import Tensor, nn

from antefix.attach import attached
from antefix.attachment import Attachment
from antefix.base import Base
from antefix.errors import GenerationError, PrefixError
from antefix.generation import Decoding, generate

NEW = 6
ROWS = [0, 1, -1, 0]


@pytest.fixture(scope="module", params=[*DECODER_ONLY, *ENCODER_DECODER])
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


@pytest.fixture(scope="module", params=[name for name in UNLIKE if name not in ENCODER_ONLY])
def unlike_base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def bare_text(base: Base) -> Tensor:
    """What the bare base writes."""
    return by_full_passes(base, prompts(base))


def mixed(base: Base, method: str = "prefix_tuning", **config: Any) -> Any:
    modules = [module.requires_grad_(False) for module in tiny_pair(base, method, **config)]
    return attached(base.model, *modules, rows=ROWS)


def prompts(base: Base) -> dict[str, Tensor]:
    name = base.name.removeprefix("tiny-")
    batch = tiny_batch(name, "right" if name in ENCODER_DECODER else "left")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def written(base: Base, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens of transformers' `generate`: NEW unlike ones, since tiny models like to repeat themselves."""
    tell_sources(base, batch["input_ids"].shape[1])
    unlike = {"max_new_tokens": NEW, "min_new_tokens": NEW, "no_repeat_ngram_size": 1}
    unlike["suppress_tokens"] = [base.model.config.pad_token_id]  # a padded row would not repeat its padding either
    arguments = {"do_sample": False, **unlike, **options}
    with torch.no_grad():
        return base.model.generate(**batch, **arguments)[:, -NEW:]  # type: ignore[operator]


def by_full_passes(base: Base, batch: dict[str, Tensor]) -> Tensor:
    """Greedy, the whole text anew for every token, no cache at all."""
    model = base.model
    ids = batch["input_ids"]
    tell_sources(base, ids.shape[1])
    if model.config.is_encoder_decoder:
        ids = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    for _ in range(NEW):
        if model.config.is_encoder_decoder:
            given = {**batch, "decoder_input_ids": ids}
        else:
            mask = torch.cat(
                [batch["attention_mask"], torch.ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1])], 1
            )
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            given = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        with torch.no_grad():
            scores = model(**given, use_cache=False).logits[:, -1]
        scores[:, [model.config.eos_token_id, model.config.pad_token_id]] = -torch.inf
        scores.scatter_(1, ids, -torch.inf)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -NEW:]


def test_greedy_decoding_is_full_passes(base: Base, bare_text: Tensor, method: str) -> None:
    """The growing cache of Mistral and the Gemmas slides, with windows shorter than the text."""
    batch = prompts(base)
    with mixed(base, method):
        wanted = by_full_passes(base, batch)
        for cache in (None, "static"):
            assert torch.equal(written(base, batch, cache_implementation=cache, disable_compile=True), wanted), cache
    assert not torch.equal(wanted, bare_text), "the prefixes change what is written"


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_greedy_decoding_with_shifted_positions(name: str) -> None:
    base = tiny_base(name)
    batch = prompts(base)
    with mixed(base, positions="shifted"):
        assert torch.equal(written(base, batch), by_full_passes(base, batch))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "temperature": 3.0}], ids=["beams", "sampling"]
)
def test_beams_and_sampling_are_the_same_without_a_cache(
    unlike_base: Base, method: str, options: dict[str, Any]
) -> None:
    batch = prompts(unlike_base)
    with mixed(unlike_base, method):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            texts.append(written(unlike_base, batch, use_cache=use_cache, **options))
    assert torch.equal(*texts)


def test_beams_write_for_a_batch_what_they_write_for_its_rows(unlike_base: Base, method: str) -> None:
    batch = prompts(unlike_base)
    with mixed(unlike_base, method) as attachment:
        together = written(unlike_base, batch, num_beams=3)
        assert isinstance(attachment, Attachment)
        for row, index in enumerate(ROWS):
            attachment.rows = [index]
            seen = batch["attention_mask"][row].bool()
            alone = {key: value[row : row + 1, seen] for key, value in batch.items()}
            assert torch.equal(written(unlike_base, alone, num_beams=3)[0], together[row])


LOOK_AT_THE_WHOLE_SOURCE = ("sparse_prefix",)
"""Whose slots depend on all of a source, before its end too."""


def test_a_source_that_is_read_in_pieces_is_the_source_or_refused(unlike_base: Base, method: str) -> None:
    if unlike_base.name.removeprefix("tiny-") in ENCODER_DECODER:
        pytest.skip("an encoder reads in one pass")
    batch = prompts(unlike_base)
    with mixed(unlike_base, method):
        whole = written(unlike_base, batch)
        if method in LOOK_AT_THE_WHOLE_SOURCE:
            with pytest.raises(PrefixError, match="let sources be read in one pass"):
                written(unlike_base, batch, prefill_chunk_size=2)
        else:
            assert torch.equal(written(unlike_base, batch, prefill_chunk_size=2), whole)


def test_gates_of_a_mean_refuse_a_source_in_pieces() -> None:
    base = tiny_base("llama")
    with mixed(base, "apt", gate_from="mean"), pytest.raises(PrefixError, match="let sources be read in one pass"):
        written(base, prompts(base), prefill_chunk_size=2)


@pytest.mark.parametrize("guess", ["prompt lookup", "assistant"])
def test_guessing_ahead_changes_nothing(unlike_base: Base, method: str, guess: str) -> None:
    batch = {key: value[:1] for key, value in prompts(unlike_base).items()}
    batch["input_ids"] = batch["input_ids"].repeat(1, 2)
    batch["attention_mask"] = batch["attention_mask"].repeat(1, 2)
    if guess == "assistant" and tiny_method(unlike_base, method).symbols:
        pytest.skip("an assistant does not know new tokens")
    assistant = tiny_base(unlike_base.name.removeprefix("tiny-")).model
    options = {"prompt_lookup_num_tokens": 3} if guess == "prompt lookup" else {"assistant_model": assistant}
    with mixed(unlike_base, method) as attachment:
        attachment.rows = [0]
        wanted = by_full_passes(unlike_base, batch)
        assert torch.equal(written(unlike_base, batch, **options), wanted)


def test_a_trainable_prefix_decodes_as_its_kept_self(unlike_base: Base, method: str) -> None:
    batch, module = prompts(unlike_base), tiny_method(unlike_base, method)
    with attached(unlike_base.model, module):
        trained = written(unlike_base, batch)
    with attached(unlike_base.model, module.requires_grad_(False)):
        assert torch.equal(trained, written(unlike_base, batch))


def seen_positions(embedding: nn.Module, base: Base, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """The indices a table of learned positions was asked for, call by call, of the first row."""
    asked: list[list[int]] = []
    handle = embedding.register_forward_hook(
        lambda module, args, out: asked.append(
            [_row_of(module.weight, vector) for vector in out.reshape(-1, out.shape[-1])]
        )
    )
    try:
        written(base, batch, **options)
    finally:
        handle.remove()
    return asked


def _row_of(table: Tensor, vector: Tensor) -> int:
    return int((table == vector).all(dim=1).nonzero()[0])


def test_gpt2_with_5_slots_counts_from_5_and_bart_from_0() -> None:
    gpt2, bart = tiny_base("gpt2"), tiny_base("bart")
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with attached(gpt2.model, tiny_method(gpt2, num_virtual_tokens=5, positions="shifted")):
        assert seen_positions(gpt2.model.transformer.wpe, gpt2, batch)[:3] == [[5, 6, 7], [8], [9]]
    offset = 2  # of BART's table
    with attached(bart.model, tiny_method(bart, num_virtual_tokens=5)):
        decoder = bart.model.model.decoder.embed_positions
        encoder = bart.model.model.encoder.embed_positions
        assert [[p - offset for p in call] for call in seen_positions(decoder, bart, batch)[:3]] == [[0], [1], [2]]
        assert [[p - offset for p in call] for call in seen_positions(encoder, bart, batch)] == [[0, 1, 2]]


def test_shifted_slots_take_from_the_context() -> None:
    base = tiny_base("gpt2")
    shifted = tiny_method(base, num_virtual_tokens=5, positions="shifted")
    with attached(base.model, shifted):
        assert base.model(torch.ones(1, CONTEXT - 5, dtype=torch.long)).logits.isfinite().all()
        with pytest.raises(PrefixError, match=rf"position {CONTEXT}, the base's last one is {CONTEXT - 1}"):
            base.model(torch.ones(1, CONTEXT - 4, dtype=torch.long))
        with pytest.raises(GenerationError, match=rf"do not fit into the context of {CONTEXT - 5} tokens"):
            generate(base, ["x" * (CONTEXT - 8)], decoding=Decoding(max_new_tokens=4))
    in_place = tiny_method(base, num_virtual_tokens=5)
    with attached(base.model, in_place):
        assert base.model(torch.ones(1, CONTEXT, dtype=torch.long)).logits.isfinite().all()
    decoding = Decoding(max_new_tokens=4)
    with attached(base.model, shifted, in_place, rows=[0, 1]):
        assert len(generate(base, ["x", "x" * (CONTEXT - 8)], decoding=decoding)) == 2
        with pytest.raises(GenerationError, match=rf"do not fit into the context of {CONTEXT - 5} tokens"):
            generate(base, ["x" * (CONTEXT - 8), "x"], decoding=decoding)
