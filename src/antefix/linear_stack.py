"""What all attached prefixes have at one linear layer, ready for any batch.

Every row of a batch, and of packed rows every token, has a prefix of its own or none.

Axes: B rows, T tokens, I width in, O width out, R width of a network, U prefixes in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from antefix.at_work import BARE, AtWork
from antefix.attention.hook import is_bare
from antefix.errors import PrefixError
from antefix.hooks import take_off
from antefix.parts.linear import ACTIVATIONS, Activation, LinearPart, Network, Reads
from antefix.sites import Sites


def linear_stacks(attachment: AtWork, sites: Sites, parts: Sequence[Mapping[str, LinearPart]]) -> list[LinearStack]:
    """Of all layers where one of the prefixes has something."""
    names = dict.fromkeys(name for of_prefix in parts for name in of_prefix)
    if not names:
        return []
    layers = sites.layers
    known = {s.name for s in layers.linear} | {s.name for s in layers.norms} | layers.biased.keys()
    known |= {layers.embeddings}
    if unknown := names.keys() - known:
        raise PrefixError(f"the base has no layer '{min(unknown)}': load the base that the prefix was trained on")
    reading = {
        name
        for of_prefix in parts
        for name, part in of_prefix.items()
        if any(reads == "feed_forward_input" for reads, _, _ in part.networks)
    }
    return [LinearStack(attachment, n, sites.feed_forward_input_of(n) if n in reading else None) for n in names]


class _Acting(NamedTuple):
    """What acts on a batch: vectors that broadcast over (B, T, .), and networks (B, T, I) -> (B, T, O)."""

    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: Tensor | None
    networks: Sequence[tuple[Reads, Callable[[Tensor], Tensor]]]


class LinearStack:
    """The parts of all attached prefixes at one linear layer."""

    def __init__(self, attachment: AtWork, name: str, feed_forward: str | None) -> None:
        """name: the layer's path. feed_forward: of the layer whose input networks read, where some read it."""
        self._attachment = attachment
        self._name, self._feed_forward = name, feed_forward
        self._kept: tuple[int, _Acting | None] | None = None
        self._acting: _Acting | None = None
        self._given: dict[Reads, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Be asked at the layer. modules: the model's, by path."""
        layer = modules[self._name]
        self._handles = [layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._behind)]
        if self._feed_forward is not None:
            self._handles.append(modules[self._feed_forward].register_forward_pre_hook(self._keep_feed_forward_input))

    def uninstall(self, modules: Mapping[str, nn.Module]) -> None:
        """Be asked no more."""
        take_off(self._handles)
        self._given.clear()
        self._acting = None
        self.forget()

    def forget(self) -> None:
        """Rows changed: gather anew."""
        self._kept = None

    def _keep_feed_forward_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not is_bare():
            self._given["feed_forward_input"] = args[0]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._acting = None if is_bare() else self._acting_on(args[0])
        if self._acting is None:
            return None
        self._given["input"] = args[0]
        if self._acting.input_scale is None:
            return None
        return (self._scaled(args[0], self._acting.input_scale), *args[1:])

    def _behind(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        acting, self._acting = self._acting, None
        given, self._given = self._given, {}  # no state outlives the layer, and no graph
        if acting is None:
            return output
        if acting.output_scale is not None:
            output = self._scaled(output, acting.output_scale)
        added = [] if acting.bias is None else [acting.bias]
        added += [net(self._in_rows(given[reads])) for reads, net in acting.networks if reads != "output"]
        output = self._with(output, added)
        on_output = [net(self._in_rows(output)) for reads, net in acting.networks if reads == "output"]
        return self._with(output, on_output)

    def _in_rows(self, x: Tensor) -> Tensor:
        """(B, T, .) of what some models lay end to end."""
        return x if x.ndim == 3 else x.view(self._num_rows(x), -1, x.shape[-1])

    def _num_rows(self, x: Tensor) -> int:
        return x.shape[0] if x.ndim == 3 else self._attachment.num_rows

    def _scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        # In the scale's precision: in bfloat16 what is learned, near 1, would be rounded away.
        return (self._in_rows(x).to(scale.dtype) * scale).to(x.dtype).view(x.shape)

    def _with(self, output: Tensor, added: Sequence[Tensor]) -> Tensor:
        for one in added:
            output = (self._in_rows(output) + one.to(output.dtype)).view(output.shape)
        return output

    def _acting_on(self, x: Tensor) -> _Acting | None:
        num_rows, forest = self._num_rows(x), self._attachment.forest
        if self._kept is not None and self._kept[0] == num_rows and forest is None:
            return self._kept[1]
        self._attachment.passes.look()
        index = self._attachment.index_of_tokens(num_rows)
        every = [made.linear.get(self._name) for made in self._attachment.made()]
        if isinstance(index, int):
            acting = _alone(None if index == BARE else every[index])
        else:
            acting = _side_by_side(every, index)
        if not self._attachment.trainable and forest is None:
            self._kept = (num_rows, acting)
        return acting


def _alone(part: LinearPart | None) -> _Acting | None:
    """One prefix for all rows."""
    if part is None:
        return None
    networks = [
        (reads, lambda x, network=network, activation=activation: network(x, activation))
        for reads, activation, network in part.networks
    ]
    return _Acting(part.input_scale_I, part.output_scale_O, part.bias_O, networks)


def _side_by_side(every: Sequence[LinearPart | None], index_BT: Tensor) -> _Acting | None:
    """A prefix for every row, (B, 1), or every token, (1, T); below 0: none."""
    used_U, place_BT = torch.unique(index_BT, return_inverse=True)
    parts_U = [None if n < 0 else every[n] for n in used_U.tolist()]
    if all(part is None for part in parts_U):
        return None

    def vectors(name: str, neutral: float) -> Tensor | None:
        of_part = [None if part is None else getattr(part, name) for part in parts_U]
        some = next((t for t in of_part if t is not None), None)
        if some is None:
            return None
        nothing = torch.full_like(some, neutral, requires_grad=False)
        return torch.stack([nothing if t is None else t for t in of_part])[place_BT]

    kinds = dict.fromkeys((r, a) for part in parts_U if part is not None for r, a, _ in part.networks)
    networks: list[tuple[Reads, Callable[[Tensor], Tensor]]] = []
    for reads, activation in kinds:
        of_part = [_networks_of(part, reads, activation) for part in parts_U]
        networks.append((reads, _Stacked.of(of_part, place_BT, activation)))
    return _Acting(vectors("input_scale_I", 1.0), vectors("output_scale_O", 1.0), vectors("bias_O", 0.0), networks)


def _networks_of(part: LinearPart | None, reads: Reads, activation: Activation) -> Network | None:
    """A prefix's networks of one kind, side by side as one."""
    found = [] if part is None else [n for r, a, n in part.networks if (r, a) == (reads, activation)]
    if len(found) < 2:
        return found[0] if found else None
    downs, ups = [n.down_RI for n in found], [n.up_OR for n in found]
    zeros = [down.new_zeros(len(down)) for down in downs]
    biases = [z if n.down_bias_R is None else n.down_bias_R for n, z in zip(found, zeros, strict=True)]
    last = [n.up_bias_O for n in found if n.up_bias_O is not None]
    return Network(
        torch.cat(downs), torch.cat(ups, dim=1), torch.cat(biases), torch.stack(last).sum(0) if last else None
    )


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A network for every row or token, narrow ones padded with zeros, which every activation leaves at zero."""

    down_URI: Tensor
    up_UOR: Tensor
    down_bias_UR: Tensor
    up_bias_UO: Tensor
    place_BT: Tensor
    activation: Activation

    @classmethod
    def of(cls, networks_U: Sequence[Network | None], place_BT: Tensor, activation: Activation) -> _Stacked:
        some = next(n for n in networks_U if n is not None)
        width = max(len(n.down_RI) for n in networks_U if n is not None)
        size_in, size_out = some.down_RI.shape[1], some.up_OR.shape[0]
        nothing = Network(some.down_RI.new_zeros(0, size_in), some.up_OR.new_zeros(size_out, 0))
        downs, ups, biases, last = [], [], [], []
        for network in networks_U:
            down, up, down_bias, up_bias = network or nothing
            missing = width - len(down)
            downs.append(nn.functional.pad(down, (0, 0, 0, missing)))
            ups.append(nn.functional.pad(up, (0, missing)))
            biases.append(
                nn.functional.pad(down.new_zeros(len(down)) if down_bias is None else down_bias, (0, missing))
            )
            last.append(up.new_zeros(size_out) if up_bias is None else up_bias)
        return cls(torch.stack(downs), torch.stack(ups), torch.stack(biases), torch.stack(last), place_BT, activation)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.down_URI.dtype)
        if self.place_BT.shape[1] == 1:  # a row has one, gathered: B products side by side
            place = self.place_BT[:, 0]
            hidden = x @ self.down_URI[place].transpose(1, 2) + self.down_bias_UR[place][:, None]
            out = ACTIVATIONS[self.activation](hidden) @ self.up_UOR[place].transpose(1, 2)
        else:  # of every token's U networks one is left
            hidden = torch.einsum("bti,uri->btur", x, self.down_URI) + self.down_bias_UR
            own = nn.functional.one_hot(self.place_BT, len(self.down_URI)).to(hidden.dtype)
            hidden = ACTIVATIONS[self.activation](hidden) * own[..., None]
            out = torch.einsum("btur,uor->bto", hidden, self.up_UOR)
        return out + self.up_bias_UO[self.place_BT]
