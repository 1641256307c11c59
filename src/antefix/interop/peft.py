"""Imports prefix-tuning checkpoints of Hugging Face PEFT. Knows PEFT's files; PEFT itself is not needed.

PEFT keeps one flat matrix (P, layers * 2 * G * D): layer 0 key, layer 0 value, layer 1 key, ..., heads inside; a
projection is folded when PEFT saves. Its keys enter the cache as they are, after rotary embedding, and tokens count
from P on: that is a prefix with `shifted` positions. For a rotary base the same prefix with `in_place` positions has
keys turned back by P, because (R(P+t) q) . k = (R(t) q) . (R(-P) k).

Axes: P slots, G key/value heads, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from antefix import strict_json
from antefix.base import Base
from antefix.errors import BaseModelError, PrefixError, PrefixFileError, one_line
from antefix.methods.prefix_tuning import PrefixTuningConfig
from antefix.parts.initial import Positions
from antefix.prefix import MOST_CARD_BYTES, BaseRecord, Card, Prefix, reason_of
from antefix.rotary import moved
from antefix.sites import Site, find_sites
from antefix.tensor_file import read_tensors

CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_MATRIX = "prompt_embeddings"
_TYPES = ("PREFIX_TUNING", "CARTRIDGE")  # a cartridge is a prefix whose first slots were frozen in training


class _Type(BaseModel):
    """The one field that every PEFT config has."""

    peft_type: str


class _AdapterConfig(BaseModel):
    """What matters of `adapter_config.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    prefix_projection: bool = False
    num_virtual_tokens: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    """Of keys and values: PEFT writes the number of groups here where heads are grouped."""
    token_dim: int = Field(ge=1)
    """All key/value heads together."""

    @model_validator(mode="after")
    def _heads_have_one_width(self) -> Self:
        if self.token_dim % self.num_attention_heads:
            raise ValueError(f"token_dim {self.token_dim} is no multiple of {self.num_attention_heads} attention heads")
        return self


def import_peft(folder: str | Path, base: Base, *, positions: Positions = "in_place") -> Prefix:
    """A PEFT checkpoint as a prefix of this base.

    `in_place` is had by turning the keys back, which the base must be able to tell; where it cannot, the prefix
    stays `shifted`, and the card's notes say why. Either way logits are PEFT's.

    Raises PrefixFileError for a folder that is no such checkpoint, PrefixError for one that does not fit the base.
    """
    path = Path(folder)
    config = _read_config(path / CONFIG_FILE)
    matrix = _read_matrix(path, config)
    sites = _fitting_sites(path, config, base)
    tensors = split_matrix(matrix, sites)
    notes = [f"Imported from a PEFT checkpoint of the base '{one_line(config.base_model_name_or_path)}'."]
    if positions == "in_place":
        try:
            keys = {s.name: tensors[f"{s.name}.key"] for s in sites}
            for name, key in moved(base.model, keys, -config.num_virtual_tokens).items():
                tensors[f"{name}.key"] = key.cpu().contiguous()
        except BaseModelError as error:
            positions = "shifted"
            notes.append(f"Positions stay shifted: {error}.")
    if getattr(base.model.config, "sliding_window", None):
        notes.append("Slots stay in sight beyond the sliding window, where PEFT's leave it.")
    return Prefix(tensors, _card(config, base, positions, " ".join(notes)))


def _read_config(path: Path) -> _AdapterConfig:
    if not path.is_file():
        raise PrefixFileError(
            f"{path}: no such file; a PEFT checkpoint is a folder with {CONFIG_FILE} and {ADAPTER_FILE}"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_CARD_BYTES + 1)
        if len(raw) > MOST_CARD_BYTES:
            raise ValueError(f"more than {MOST_CARD_BYTES:,} bytes")
        content = strict_json.parse(raw)
        found = _Type.model_validate(content).peft_type
        if found not in _TYPES:
            raise PrefixFileError(
                f"{path}: peft type '{one_line(found, 60)}' cannot become a prefix: only {' and '.join(_TYPES)} can"
            )
        return _AdapterConfig.model_validate(content)
    except (OSError, ValueError) as error:
        raise PrefixFileError(f"{path}: not a readable PEFT config ({reason_of(error)})") from error


def _read_matrix(folder: Path, config: _AdapterConfig) -> Tensor:
    path = folder / ADAPTER_FILE
    if not path.is_file() and (folder / "adapter_model.bin").exists():
        raise PrefixFileError(
            f"{folder}: holds a pickle (adapter_model.bin), which can run code when read and is never opened: "
            "load it in PEFT and save it with safe_serialization=True"
        )
    tensors = read_tensors(path)
    if _MATRIX not in tensors:
        raise PrefixFileError(f"{path}: has no tensor '{_MATRIX}': it is no prefix that PEFT saved")
    if others := tensors.keys() - {_MATRIX}:
        raise PrefixFileError(f"{path}: holds '{min(others)}' beside '{_MATRIX}': only a prefix alone can be imported")
    matrix = tensors[_MATRIX]
    wanted = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
    if tuple(matrix.shape) != wanted:
        raise PrefixFileError(f"{path}: '{_MATRIX}' has shape {tuple(matrix.shape)}, {CONFIG_FILE} says {wanted}")
    return matrix.float()


def _fitting_sites(folder: Path, config: _AdapterConfig, base: Base) -> tuple[Site, ...]:
    sites = find_sites(base.model)
    if sites.kinds != ("self",):
        raise PrefixError(
            f"'{base.name}' is no decoder-only model: PEFT's prefix acts differently there and cannot be converted"
        )
    if len(sites.attention) != config.num_layers:
        raise PrefixError(
            f"{folder} has {config.num_layers} layers, the base '{base.name}' {len(sites.attention)}: "
            f"name the base it was trained on ('{one_line(config.base_model_name_or_path)}')"
        )
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    for site in sites.attention:
        if (site.num_key_value_heads, site.key_width, site.value_width) != (heads, width, width):
            raise PrefixError(
                f"{folder} has {heads} key/value heads of width {width}, the base '{base.name}' has "
                f"{site.num_key_value_heads} of width {site.key_width} at {site.name}: "
                f"name the base it was trained on ('{one_line(config.base_model_name_or_path)}')"
            )
    return sites.attention


def split_matrix(matrix: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """PEFT's matrix (P, layers * 2 * G * D) as tensors by name, keys and values as PEFT holds them (G, P, D)."""
    tensors = {}
    num_slots = matrix.shape[0]
    parts = iter(matrix.chunk(2 * len(sites), dim=1))
    for site in sites:
        for part in ("key", "value"):
            heads = next(parts).reshape(num_slots, site.num_key_value_heads, -1)
            tensors[f"{site.name}.{part}"] = heads.transpose(0, 1).contiguous()
    return tensors


def _card(config: _AdapterConfig, base: Base, positions: Positions, notes: str) -> Card:
    # PEFT draws its first values from a standard normal distribution unless told otherwise; its file does not say.
    method = PrefixTuningConfig.model_validate(
        {
            "num_virtual_tokens": config.num_virtual_tokens,
            "sites": ["self"],
            "initial": "normal",
            "initial_scale": 1.0,
            "positions": positions,
        }
    )
    return Card(
        method="prefix_tuning",
        config=method.model_dump(mode="json"),
        positions=positions,
        base=BaseRecord(name=base.name, revision=base.revision, fingerprint=base.fingerprint),
        training={
            "imported_from": "peft",
            **config.model_dump(exclude={"num_layers", "num_attention_heads", "token_dim"}),
        },
        notes=notes,
    )
