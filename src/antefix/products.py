"""Products with frozen float32 weights, by the library that computes them faster.

torch hands float32 products to MKL, and MKL does not use AVX-512 on AMD's processors: there oneDNN, which torch has
too, is twice as fast (`docs/experiments.md`). Frozen linear layers of a base are handed to oneDNN there. The
values are those of float32, summed in another order. Weights stay as they are: a layer's class becomes a subclass of
its own, and a layer whose weights are trained, or whose states are rounded, computes as ever.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

_CPUINFO = Path("/proc/cpuinfo")
_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Of oneDNN's compiled code, and of torch's descriptions of it, the latest that are kept. Enough for all layers' shapes
at two dozen numbers of rows; with 16 or 1,024 products took as long."""


@cache
def onednn_pays() -> bool:
    """Whether this is a processor on which MKL leaves AVX-512 unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text(encoding="utf-8", errors="replace")


class FrozenLinear(nn.Linear):
    """A linear layer; frozen, in float32 and on the processor its products are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias) if takes_onednn(self, input) else super().forward(input)


class FrozenConv1D(Conv1D):
    """The same for GPT-2's kind of linear layer, whose weight is transposed."""

    def forward(self, x: Tensor) -> Tensor:
        if takes_onednn(self, x):
            return product(x, self.weight.t(), self.bias)
        return super().forward(x)  # type: ignore[no-untyped-call,no-any-return]


_BY_ONEDNN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
_BY_TORCH = {ours: torchs for torchs, ours in _BY_ONEDNN.items()}


def by_onednn(model: nn.Module) -> None:
    """Hand the products of a model's frozen linear layers to oneDNN.

    It compiles code for every shape of a layer and every number of rows, a quarter of a megabyte each, torch describes
    each in as much again, and both keep the latest 1,024: for texts of all lengths that is half a gigabyte. Unless
    the environment says otherwise, fewer are kept.
    """
    for name, number in _KEPT.items():
        os.environ.setdefault(name, number)
    _exchange(model, _BY_ONEDNN)


def by_torch(model: nn.Module) -> None:
    """Undo `by_onednn`."""
    _exchange(model, _BY_TORCH)


def _exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def takes_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN multiplies these states with the weights of this layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return (
        type(layer) in _BY_TORCH
        and type(weight) in (Tensor, nn.Parameter)  # a quantised one calls itself float32 too
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not weight.requires_grad
        and not (isinstance(bias, Tensor) and bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, for x of shape (..., in) and W of shape (out, in); a gradient for x alone."""
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return _FrozenProduct.forward(x, weight, bias)
    return _FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call,no-any-return]


class _FrozenProduct(torch.autograd.Function):
    """A linear map: its own derivative, forwards and, transposed, backwards, as often as is asked for."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_weights: None) -> Tensor:
        (weight,) = ctx.saved_tensors
        return product(tangent, weight)
