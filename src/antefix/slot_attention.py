"""How much attention every slot of a prefix gets on given texts: which of them matter, and which may go.

Axes: B rows, H query heads, G key/value heads, T queries, P slots, D key width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from antefix.attach import attached
from antefix.attention.branch import Branch, Call
from antefix.attention.slot_share import SlotBranch
from antefix.base import Base
from antefix.batches.form import BatchForm, batch_of
from antefix.batches.head import pair_losses
from antefix.data.encode import encode
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.data.plan import Unit
from antefix.errors import DataError, PrefixError
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.parts.key_value import KeyValue
from antefix.prefix import Prefix
from antefix.sites import find_sites


@torch.no_grad()
def slot_attention(
    base: Base, prefix: Prefix, examples: Sequence[Example], watch: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """(P,) by site: the share of the attention that a slot gets, a mean over heads and the tokens that see the slots.

    Sources are written as the card says, followed by their targets. watch: told how many of how many pairs are done.
    Raises PrefixError for a prefix that is anything but plain keys and values, or does not write texts, WrongBaseError
    for one of another base, and DataError where no example has a target.
    """
    module = prefix.module(base.model)
    is_plain = module.folds_to_key_value and not module.branches() and module.slots()
    if not prefix.card.task.writes_text or not is_plain:
        raise PrefixError("attention is measured of prefixes that write texts and are plain keys and values")
    watched = _Watched(module)
    sites = find_sites(base.model)
    limits = module.limits_in(base.context_length)
    text_format = TextFormat.from_dict(prefix.card.text_format)
    data = encode(examples, text_format, base.tokenizer, limits, for_encoder=not sites.is_causal)
    units = [Unit(n, (t,)) for n, example in enumerate(data.examples) for t in range(len(example.targets))]
    if not units:
        raise DataError("no example has a target: attention is measured while targets are read")
    form: BatchForm = "encoder_decoder" if base.model.config.is_encoder_decoder else "padded"
    with attached(base.model, watched):
        for done, unit in enumerate(units):  # one at a time: no query is padding
            if watch is not None:
                watch(done, len(units))
            pair_losses(base.model, batch_of(form, data, [unit], base.model))
    return {name: (branch.sum_P / branch.num_queries).float().cpu() for name, branch in watched.at.items()}


class _Watched(MethodModule):
    """A prefix whose slots take part in the same softmax, and count what they get."""

    def __init__(self, module: MethodModule) -> None:
        super().__init__()
        self._module = module
        self.at = {name: _Counting(pair, module.for_targets) for name, pair in module.slots().items()}

    @property
    def positions(self) -> Positions:
        return self._module.positions

    @property
    def num_virtual_tokens(self) -> int:
        return self._module.num_virtual_tokens

    @property
    def needs_places(self) -> bool:
        return True

    def branches(self) -> Mapping[str, Sequence[Branch]]:
        return {name: (branch,) for name, branch in self.at.items()}


class _Counting(SlotBranch):
    def __init__(self, slots: KeyValue, for_targets: bool) -> None:
        super().__init__(*slots)
        self._for_targets = for_targets
        self.sum_P = torch.zeros(slots.key_GPD.shape[1], dtype=torch.float64)
        self.num_queries = 0

    def changed(self, call: Call, scores_BHTP: Tensor) -> Tensor:
        if self._for_targets:
            is_target_BT = call.places().is_target
            scores_BHTP = scores_BHTP.masked_fill(~is_target_BT[:, None, :, None], -torch.inf)
            self.num_queries += int(is_target_BT.expand(scores_BHTP.shape[0], -1).sum())
        else:
            self.num_queries += scores_BHTP.shape[0] * scores_BHTP.shape[2]
        everything_BHT = torch.logaddexp(call.tokens().lse_BHT.to(scores_BHTP.dtype), scores_BHTP.logsumexp(-1))
        shares_BHTP = torch.exp(scores_BHTP - everything_BHT[..., None]).double()
        self.sum_P += shares_BHTP.mean(1).sum((0, 1)).cpu()
        return scores_BHTP
