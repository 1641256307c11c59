"""Loads a base: the frozen model with its tokenizer and its fingerprint.

A base is named by `smollm2-135m` (the embedded model), a hub id, a folder, or a GGUF file. Knows nothing of
prefixes. The weights are frozen and the model is in eval mode from here on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from antefix import embedded
from antefix.errors import BaseModelError

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class Base:
    """A frozen model, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint`; computed when first asked for."""
        return fingerprint(self.model)

    @property
    def context_length(self) -> int | None:
        """The most tokens the model has positions for; None where its config does not say."""
        config = self.model.config
        length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return None if length is None else int(length)


def load_base(name: str | Path, *, dtype: Dtype = "float32", device: str = "cpu", revision: str | None = None) -> Base:
    """Load a base by name, hub id, folder or GGUF file.

    Raises BaseModelError when nothing of that name can be loaded. `auto` keeps the precision of the file.
    """
    name = str(name)
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if name == embedded.NAME:
        source["pretrained_model_name_or_path"] = str(embedded.folder())
    elif name.endswith(".gguf"):
        path = Path(name)
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif not Path(name).exists() and name.count("/") > 1:
        raise BaseModelError(f"no folder or file '{name}': give a folder, a .gguf file, a hub id or '{embedded.NAME}'")
    if revision is not None:
        source["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(**source)
        model = _auto_class(config).from_pretrained(**source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"cannot load the base '{name}': {first_line} (give a folder, a .gguf file, a hub id or '{embedded.NAME}')"
        ) from error
    model.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(model.to(device).eval(), tokenizer, name, revision)


def _auto_class(config: Any) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    architectures = " ".join(config.architectures or [])
    if "MaskedLM" in architectures:
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell one set of weights from another.

    Hashes names, shapes and one value of every row, rounded to bfloat16: fast, equal for float32 and
    bfloat16 copies of the same weights (not for float16), and a changed row is noticed with the chance that
    its drawn value changed. Tied weights count once; what is attached to the model does not count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith("antefix."):
            continue
        rows = parameter.detach().reshape(parameter.shape[0] if parameter.ndim else 1, -1)
        columns = torch.arange(rows.shape[0], device=rows.device) * 2_654_435_761 % rows.shape[1]
        drawn = rows.gather(1, columns[:, None]).to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(drawn.numpy().tobytes())
    return digest.hexdigest()[:16]
