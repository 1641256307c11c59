"""Loads a base: the frozen model with its tokenizer and its fingerprint.

A base is named by `smollm2-135m` (the embedded model), a hub id, a folder, or a GGUF file. Knows nothing of
prefixes. The weights are frozen and the model is in eval mode from here on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from antefix import embedded
from antefix.data.symbols import WithSymbols
from antefix.errors import BaseModelError, nearest, one_line
from antefix.fingerprint import fingerprint
from antefix.products import by_onednn, onednn_pays
from antefix.quantised import is_quantised, quantise

Dtype = Literal["float32", "bfloat16", "float16", "int8", "native", "auto"]
"""Precision of the frozen weights. `native`: bfloat16 where this processor or GPU multiplies it natively, else float32.
`int8`: those of linear layers, the output head excepted, a scale for every row; everything else, and all that is
computed, `native`. `auto`: as the file has it."""

_FOREIGN_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)
"""What transformers raises where files are missing or broken."""


@dataclass(frozen=True)
class Base:
    """A frozen model, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None = None

    def tokenizer_with(self, symbols: Sequence[str]) -> PreTrainedTokenizerBase:
        """The tokenizer, with these symbols as one token each after the base's own (see `special_tokens`)."""
        if not symbols:
            return self.tokenizer
        first_id = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        return cast("PreTrainedTokenizerBase", WithSymbols(self.tokenizer, symbols, first_id))

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint`; computed when first asked for."""
        return fingerprint(self.model)

    @property
    def precision(self) -> str:
        """Of the frozen weights: `float32`, `bfloat16`, `float16` or `int8`."""
        return "int8" if is_quantised(self.model) else str(self.model.dtype).removeprefix("torch.")

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's own, and those that the model's generation config names."""
        named = self.tokenizer.eos_token_id, getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset(i for one in named if one is not None for i in ([one] if isinstance(one, int) else one))

    @property
    def context_length(self) -> int | None:
        """The most tokens the model has positions for; None where its config does not say."""
        return context_length(self.model.config)


def context_length(config: Any) -> int | None:
    """The most tokens a model of this config has positions for; None where it does not say."""
    config = config.get_text_config()  # of a model that reads images too, the part that reads texts
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if length is None else int(length)


def load_base(name: str | Path, *, dtype: Dtype = "float32", device: str = "cpu", revision: str | None = None) -> Base:
    """Load a base by name, hub id, folder or GGUF file.

    dtype: see `Dtype`. device: as torch names it; `auto` is an accelerator where there is one. Raises BaseModelError
    when nothing of that name can be loaded.
    """
    name = str(name)
    if dtype not in get_args(Dtype):
        raise BaseModelError(f"unknown dtype '{dtype}': {nearest(dtype, get_args(Dtype))}")
    source = _source(name, revision)
    try:
        config = AutoConfig.from_pretrained(**source)
        on_disk = Path(source["pretrained_model_name_or_path"]).is_dir()
        with embedded.without_bars() if on_disk else nullcontext():
            model = _auto_class(config).from_pretrained(**source, dtype=_computed_in(dtype, device))
    except _FOREIGN_ERRORS as error:
        raise _cannot_load(name, error) from error
    tokenizer = _tokenizer(source, name)
    model.requires_grad_(False)
    if dtype == "int8":
        quantise(model)
    model = _moved(model, device).eval()
    if model.device.type == "cpu" and onednn_pays():
        by_onednn(model)
    return Base(model, tokenizer, name, revision)


def load_tokenizer(name: str | Path) -> tuple[PreTrainedTokenizerBase, Any]:
    """A base's tokenizer and its config, without the weights: for who speaks to a process that has these.

    Raises BaseModelError when nothing of that name can be loaded.
    """
    source = _source(str(name), None)
    try:
        config = AutoConfig.from_pretrained(**source)
    except _FOREIGN_ERRORS as error:
        raise _cannot_load(str(name), error) from error
    return _tokenizer(source, str(name)), config


def _cannot_load(name: str, error: Exception) -> BaseModelError:
    why = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
    return BaseModelError(
        f"cannot load the base '{name}': {why} (give a folder, a .gguf file, a hub id or '{embedded.NAME}'; "
        "HF_HUB_OFFLINE=1 asks no hub)"
    )


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """Where transformers finds a base of this name. Raises BaseModelError for what is none at first sight."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if name in embedded.WHEELS:
        source["pretrained_model_name_or_path"] = str(embedded.folder(name))
    elif name.endswith(".gguf"):
        path = Path(name)
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif not Path(name).exists() and (near := get_close_matches(name, embedded.WHEELS, n=1, cutoff=0.8)):
        raise BaseModelError(f"no base '{name}': did you mean '{near[0]}'?")
    elif not Path(name).exists() and name.count("/") > 1:
        raise BaseModelError(f"no folder or file '{name}': give a folder, a .gguf file, a hub id or '{embedded.NAME}'")
    if revision is not None:
        source["revision"] = revision
    return source


def _computed_in(dtype: Dtype, device: str) -> Any:
    if dtype in ("native", "int8"):
        dtype = native_precision(device)
    return dtype if dtype == "auto" else getattr(torch, dtype)


def native_precision(device: str) -> Literal["float32", "bfloat16"]:
    """What `native` means on a device (`auto`: the accelerator, where there is one)."""
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: str) -> bool:
    found = _accelerator() if device == "auto" else _named(device)
    if found is None or found.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return found.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _named(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _no_device(device, error) from error


def _no_device(device: str, error: Exception) -> BaseModelError:
    return BaseModelError(f"device '{device}' cannot be used here: {one_line(error)}")


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def _moved(model: Any, device: str) -> Any:
    if device == "auto":
        found = _accelerator()
        return model if found is None else model.to(found)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise _no_device(device, error) from error


def _tokenizer(source: dict[str, Any], name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except _FOREIGN_ERRORS as error:
        raise BaseModelError(
            f"the base '{name}' has no tokenizer that can be loaded: put the files of its tokenizer beside its weights "
            "(tokenizer.save_pretrained)"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _auto_class(config: Any) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    architectures = " ".join(config.architectures or [])
    if "MaskedLM" in architectures:
        return AutoModelForMaskedLM
    if architectures in ("BertModel", "RobertaModel"):
        return AutoModel
    return AutoModelForCausalLM
