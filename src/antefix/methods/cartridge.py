"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a document as trained slots.

Slots start as the keys and values of the document's first P tokens, exactly, at positions 0..P-1; tokens stand after
them (`shifted`). The first slot stays as it is: an attention sink that training cannot move. Untrained and with P the
whole document, logits are those of the document in context. Training distils the frozen base that has the document in
context into the slots (`antefix cartridge`): the loss is the cross-entropy with its k likeliest tokens, not normalised
again (equation 3 and the released code).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from antefix.base import Base
from antefix.errors import ConfigError, DataError, PrefixError
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.initial import Positions


class CartridgeConfig(PrefixTuningConfig):
    """The choices of a cartridge: those of prefix-tuning, but for where slots start and stand."""

    num_virtual_tokens: int | None = Field(256, ge=1, le=1_000_000)
    """Slots a site (P); None, which only Python can say: as many as the document has tokens."""
    document: str | None = None
    """The text file whose first P tokens the slots start from."""
    initial: Literal["text", "prefix"] = "text"
    """First values: of the document, or of a kept prefix."""
    freeze_first: bool = True
    """Keep the first slot as it starts: an attention sink that training cannot move."""
    positions: Positions = "shifted"
    """`shifted`: tokens stand after the slots, as they would after the document."""

    @model_validator(mode="after")
    def _starts_from_its_document(self) -> Self:
        if self.initial_text != PrefixTuningConfig.model_fields["initial_text"].default:
            raise ValueError("a cartridge starts from its document: give `document`, and no initial_text")
        return self


class Cartridge(PrefixTuning):
    """One cartridge."""

    Config = CartridgeConfig
    summary = "a document as slots, trained to answer as if it were in context (Cartridges, 2025)"
    paper = "arXiv 2506.06266"
    needs = ("a document (config.document)",)

    @classmethod
    def default_learning_rate(cls, config: PrefixTuningConfig) -> float:
        """2e-2 for direct slots, as released; here relative to their size."""
        return 2e-2 if config.parametrisation == "direct" else super().default_learning_rate(config)

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        """A fresh cartridge. Raises DataError for an unreadable document, PrefixError for too short a one."""
        if config.initial == "prefix":
            return super().build(base, config)
        if config.document is None:
            raise ConfigError("config.document: a cartridge needs its document, name a text file")
        text = read_document(config.document)
        num_tokens = len(base.tokenizer(text, add_special_tokens=False)["input_ids"])
        if config.num_virtual_tokens is not None and config.num_virtual_tokens > num_tokens:
            raise PrefixError(
                f"{config.document} has {num_tokens} tokens, num_virtual_tokens is {config.num_virtual_tokens}: take "
                "at most as many"
            )
        module = super().build(base, config.model_copy(update={"initial_text": text}))
        module.config = config  # without the document's text, which a card is no place for
        return module


def read_document(path: str) -> str:
    """A document's text. Raises DataError for a file that is missing, empty or no UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable text file ({error})") from error
    if not text:
        raise DataError(f"{path}: the document is empty")
    return text
