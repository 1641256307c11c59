"""PIP-Indirect (Wan et al. 2023, arXiv 2305.16701): a prefix that must be able to say a parse.

Prefix-tuning of an encoder-decoder with one more loss. With e what the frozen encoder makes of a second text, the
target's parse, and the prefix of the last encoder layer:

    e_hat = W MHA(query e, key [P_k; e], value [P_v; e]) + b
    loss = cross-entropy + mu mean(1 - |cos(e_hat, e)|)

MHA and W serve training alone: what is kept is a prefix, and needs no second text. Beside direct slots, whose rate is
relative to their size, they learn at a fiftieth of it: 1e-3 at the default. With mu = 0 it is prefix-tuning step for
step. Padding is masked. The released code takes the cosine along the sequence, one for every feature, which
`cosine_axis = "sequence"` does; here it is along the features.

Axes: B rows, P tokens of a second text, C width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from antefix.attention.branch import Condition
from antefix.base import Base
from antefix.methods.pip_direct import SECOND_TEXT, last_encoder_site
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from antefix.parts.key_value import KeyValue
from antefix.sites import Site, find_sites

_SPEAKER_RATE = 0.02
"""Of the rate of direct slots."""


class PipIndirectConfig(PrefixTuningConfig):
    """The choices of PIP-Indirect: those of prefix-tuning, and the parse's loss."""

    mu: float = Field(1.0, ge=0)
    """Weight of the parse's loss."""
    cosine_axis: Literal["feature", "sequence"] = "feature"
    """Along what the cosine is taken: `sequence` as in the released code."""


class PipIndirect(PrefixTuning):
    """One prefix, with the networks of its second loss while it is trained."""

    Config = PipIndirectConfig
    summary = "a prefix trained to say a second text as well (PIP-Indirect, 2023)"
    paper = "arXiv 2305.16701"
    parts = ("key/value slots", "networks in training")
    needs = SECOND_TEXT

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.speaker: _Speaker | None = None  # of the second loss; gone once the prefix is kept

    @classmethod
    def build(cls, base: Base, config: Any) -> Self:
        site = last_encoder_site(find_sites(base.model))
        module: Self = super().build(base, config)
        if config.mu > 0:
            module.speaker = _Speaker(site)
        return module

    @property
    def condition_length(self) -> int | None:
        return None if self.speaker is None else self.num_virtual_tokens

    def rate_scales(self) -> list[tuple[list[nn.Parameter], float]]:
        """Ordinary weights at the rate of direct slots would be thrown about, and the slots by their gradients."""
        if self.speaker is None or self.config.parametrisation != "direct":
            return super().rate_scales()
        learned = {name: p for name, p in self.named_parameters() if p.requires_grad}
        slots = [p for name, p in learned.items() if not name.startswith("speaker.")]
        return [(slots, 1.0), (list(self.speaker.parameters()), _SPEAKER_RATE)]

    def auxiliary_loss(self, condition: Condition | None) -> Tensor | None:
        if condition is None or self.speaker is None:
            return None
        distance: Tensor = self.speaker(self.learned_slots(), condition, self.config.cosine_axis)
        return float(self.config.mu) * distance


class _Speaker(nn.Module):
    """Says a second text's states from the slots of one site."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._site = site.name
        self.attention = nn.MultiheadAttention(site.hidden_width, site.num_heads, batch_first=True)
        self.projection = nn.Linear(site.hidden_width, site.hidden_width)

    def forward(self, slots: Mapping[str, KeyValue], condition: Condition, axis: str) -> Tensor:
        """1 - |cos(e_hat, e)|, the mean over tokens, or over features along the sequence."""
        states, there = condition.states_BPC.to(self.projection.weight.dtype), condition.is_there_BP
        key, value = (x.transpose(0, 1).flatten(1).expand(len(states), -1, -1) for x in slots[self._site])
        hidden = torch.cat([there.new_zeros(len(states), key.shape[1]), ~there], dim=1)
        attended, _ = self.attention(
            states, torch.cat([key, states], dim=1), torch.cat([value, states], dim=1), key_padding_mask=hidden
        )
        said: Tensor = self.projection(attended)
        if axis == "sequence":
            said, wanted = said * there[..., None], states * there[..., None]
            return (1 - torch.cosine_similarity(said, wanted, dim=1).abs()).mean()
        return ((1 - torch.cosine_similarity(said, states, dim=2).abs()) * there).sum() / there.sum()
