"""Texts from sources, through transformers' own `generate`.

What is attached to the model decides which prefix writes; its card says how a source becomes text and how to
decode, unless told otherwise. Sources are sorted by length, so that a batch pads little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from antefix.at_work import BARE
from antefix.attach import current_attachment, indices_of_sources, rows_of_batch, rows_of_sources, told
from antefix.attention.branch import Condition
from antefix.base import Base
from antefix.condition import read_condition
from antefix.data.encode import encode_condition
from antefix.data.example import Example, Source, Table, Triples
from antefix.data.linearise import TextFormat, default_format
from antefix.decoding import Decoding
from antefix.errors import BaseModelError, GenerationError
from antefix.frame_decoding import OnlyFrames
from antefix.prefix import Prefix
from antefix.settings import validated


def default_decoding(sources: Sequence[Example | Source]) -> Decoding:
    """Beams of 5 for tables and triples, as in the paper (section 5 and its code); greedy for all else."""
    structured = all(isinstance(_plain(s), Table | Triples) for s in sources)
    return Decoding(num_beams=5 if structured else 1)


def generate(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    text_format: TextFormat | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """One text for every source, in the order given. See `generate_each` for the arguments and errors."""
    texts = [""] * len(sources)
    for index, text in generate_each(
        base, sources, text_format=text_format, decoding=decoding, batch_size=batch_size, **options
    ):
        texts[index] = text
    return texts


def generate_each(
    base: Base,
    sources: Sequence[Example | Source],
    *,
    text_format: TextFormat | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    streamer: BaseStreamer | None = None,
    assistant_model: PreTrainedModel | None = None,
    on_cut: Callable[[int], None] = lambda num_cut: None,
) -> Iterator[tuple[int, str]]:
    """`(index, text)` as batches are done, longest sources first.

    text_format, decoding: None takes them from the card of the prefix that is attached (the first, where there
    are several), else the defaults. assistant_model: a small model that guesses ahead (one row at a time). on_cut: told
    how many sources were cut to the text format's `max_source_tokens`, where any was.

    Raises GenerationError for an empty source list or one that does not fit, DataError for a source that the
    text format cannot write, BaseModelError for a base that writes no text.
    """
    require_generator(base)
    plain = [_plain(s) for s in sources]
    text_format = text_format or _card_format(base) or default_format(plain)
    decoding = decoding or _card_decoding(base)
    one_at_a_time = assistant_model is not None or decoding.prompt_lookup_num_tokens is not None or streamer is not None
    size = 1 if one_at_a_time else batch_size
    attachment = current_attachment(base.model)
    if assistant_model is not None and attachment is not None and attachment.has_new_tokens:
        raise GenerationError("an assistant model does not know the new tokens of what is attached: leave it out")
    is_encoder_decoder = bool(base.model.config.is_encoder_decoder)
    rows = rows_of_sources(base.model, len(plain))
    indices = indices_of_sources(base.model, len(plain))
    tokenizers = _tokenizers(base, indices)
    encoded = [
        text_format.encode_source_cut(tokenizer, source, for_encoder=is_encoder_decoder)
        for tokenizer, source in zip(tokenizers, plain, strict=True)
    ]
    ids = [row for row, _ in encoded]
    if num_cut := sum(cut for _, cut in encoded):
        on_cut(num_cut)
    ids = _with_inserted(base, ids, indices)
    _check_length(base, sources, ids, indices, decoding, is_encoder_decoder)
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    stop = text_format.stop_token_id(base.tokenizer)
    arguments = decoding.arguments() | {"eos_token_id": stop, "pad_token_id": base.tokenizer.pad_token_id}
    if streamer is not None:
        arguments["streamer"] = streamer
    if assistant_model is not None:
        arguments["assistant_model"] = assistant_model
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        with rows_of_batch(base.model, rows, batch):
            condition = _condition(base, [sources[i] for i in batch], [indices[i] for i in batch])
            only = _only_frames(base, [ids[i] for i in batch], [tokenizers[i] for i in batch], decoding, stop)
            new_ids = _generate_batch(base, [ids[i] for i in batch], condition, arguments | only)
        for index, row in zip(batch, new_ids, strict=True):
            yield index, _cut(tokenizers[index], row, stop)


def terminal_streamer(base: Base) -> BaseStreamer:
    """Prints a text word by word while it is written, with what is attached by then."""
    (tokenizer,) = _tokenizers(base, indices_of_sources(base.model, 1))
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def require_generator(base: Base) -> None:
    """Raises BaseModelError for a base that writes no text: an encoder such as BERT."""
    if not base.model.can_generate():
        raise BaseModelError(
            f"the base '{base.name}' ({type(base.model).__name__}) writes no text: take a decoder (GPT-2, Llama) or an "
            "encoder-decoder (BART, T5)"
        )


def _plain(source: Example | Source) -> Source:
    return source.source if isinstance(source, Example) else source


def _card_format(base: Base) -> TextFormat | None:
    for prefix in _attached_prefixes(base):
        if prefix.card.text_format:
            return TextFormat.from_dict(prefix.card.text_format)
    return None


def _card_decoding(base: Base) -> Decoding:
    for prefix in _attached_prefixes(base):
        return validated(Decoding, prefix.card.decoding, "decoding.")
    return Decoding()


def _attached_prefixes(base: Base) -> list[Prefix]:
    attachment = current_attachment(base.model)
    return [p for p in attachment.prefixes if isinstance(p, Prefix)] if attachment else []


def _check_length(
    base: Base, sources: Sequence[Any], ids: list[list[int]], indices: Sequence[int], decoding: Decoding,
    is_encoder_decoder: bool,
) -> None:  # fmt: skip
    if not ids:
        raise GenerationError("nothing to generate: the list of sources is empty")
    attachment = current_attachment(base.model)
    for source, row, index in zip(sources, ids, indices, strict=True):
        limit = base.context_length
        if attachment is not None and index != BARE:
            limit = attachment.module_of(index).room_in(limit)
        if limit is None:
            continue
        # An encoder-decoder has the context twice: for the source, and for a start token and the text.
        needed = len(row) + decoding.max_new_tokens
        if is_encoder_decoder:
            needed = max(len(row), 1 + decoding.max_new_tokens)
        if needed > limit:
            where = (source.where if isinstance(source, Example) else "") or "a source"
            raise GenerationError(
                f"{where}: {len(row)} source tokens and max_new_tokens {decoding.max_new_tokens} do not fit into the "
                f"context of {limit} tokens; shorten the source or lower max_new_tokens"
            )


def _only_frames(
    base: Base, ids: Sequence[list[int]], tokenizers: Sequence[PreTrainedTokenizerBase], decoding: Decoding, stop: int
) -> dict[str, Any]:
    """Further arguments of `generate` where only frames may be written."""
    if not decoding.frames:
        return {}
    attachment = current_attachment(base.model)
    symbols = (
        ()
        if attachment is None
        else {s for n in range(len(attachment.prefixes)) for s in attachment.module_of(n).symbols}
    )
    labels = sorted(symbol[1:] for symbol in symbols if symbol.startswith("["))
    start = 1 if base.model.config.is_encoder_decoder else max(map(len, ids))
    processor = OnlyFrames(tokenizers, start, stop, decoding.max_new_tokens, decoding.num_beams, labels)
    return {"logits_processor": LogitsProcessorList([processor])}


def _tokenizers(base: Base, indices: Sequence[int]) -> list[PreTrainedTokenizerBase]:
    """Every source's tokenizer, which knows the new tokens of its prefix."""
    attachment = current_attachment(base.model)
    if attachment is None or not attachment.has_new_tokens:
        return [base.tokenizer] * len(indices)
    known = {n: base.tokenizer_with(attachment.module_of(n).symbols) for n in set(indices)}
    return [known[n] for n in indices]


def _with_inserted(base: Base, ids: list[list[int]], indices: Sequence[int]) -> list[list[int]]:
    """Sources with the tokens that soft tokens stand in."""
    attachment = current_attachment(base.model)
    if attachment is None:
        return ids
    pad = base.tokenizer.pad_token_id
    return [
        source + [pad] * attachment.module_of(n).num_inserted_tokens for source, n in zip(ids, indices, strict=True)
    ]


def _condition(base: Base, sources: Sequence[Example | Source], indices: Sequence[int]) -> Condition | None:
    """The second texts of these sources, empty for those whose prefix reads none; None where nothing attached does.

    Raises GenerationError for a source that needs one and cannot have it.
    """
    attachment = current_attachment(base.model)
    length = None if attachment is None else attachment.condition_length
    if attachment is None or length is None:
        return None
    texts: list[tuple[int, ...]] = []
    for source, index in zip(sources, indices, strict=True):
        if attachment.module_of(index).condition_length is None:
            texts.append(())
        elif isinstance(source, Example):
            texts.append(encode_condition(source, base.tokenizer, length))
        else:
            raise GenerationError("its prefix reads a second text for every source: give examples with a condition")
    return read_condition(base.model, texts, length)


def _generate_batch(
    base: Base, ids: list[list[int]], condition: Condition | None, arguments: dict[str, Any]
) -> list[list[int]]:
    longest = max(len(r) for r in ids)
    device = base.model.device
    pad = base.tokenizer.pad_token_id
    is_encoder_decoder = bool(base.model.config.is_encoder_decoder)
    padded, mask = [], []
    for row in ids:
        gap = longest - len(row)
        # A decoder goes on at the right end, so padding stands on the left; an encoder does not care.
        padded.append(row + [pad] * gap if is_encoder_decoder else [pad] * gap + row)
        mask.append([1] * len(row) + [0] * gap if is_encoder_decoder else [0] * gap + [1] * len(row))
    with torch.no_grad(), told(base.model, source_lengths=longest, condition=condition):
        out = base.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device), **arguments
        )
    start = 1 if is_encoder_decoder else longest
    return out[:, start:].tolist()  # type: ignore[no-any-return]


def _cut(tokenizer: PreTrainedTokenizerBase, row: list[int], stop: int) -> str:
    if stop in row:
        row = row[: row.index(stop)]
    return str(tokenizer.decode(row, skip_special_tokens=True)).strip()
