"""Products with frozen float32 weights, by the library that computes them faster.

torch hands float32 products to MKL, and MKL does not use AVX-512 on AMD's processors: there oneDNN, which torch has
too, is 2.0 to 2.3 times as fast (`docs/experiments.md`). Frozen linear layers of a base are handed to oneDNN there. The
values are those of float32, summed in another order. No weight changes its value, no memory is added: a layer's class
becomes a subclass of `nn.Linear`, and a layer whose weights are trained computes as ever.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_CPUINFO = Path("/proc/cpuinfo")


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

    Weights are laid down column by column, as it likes them where few rows are multiplied (decoding), unless an
    embedding shares them.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if type(module) is nn.Linear and id(module.weight) not in shared and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()
    _exchange(model, _BY_ONEDNN)


def by_torch(model: nn.Module) -> None:
    """Undo `by_onednn`."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.weight.data = module.weight.data.contiguous()
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
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not weight.requires_grad
        and not (isinstance(bias, Tensor) and bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, for x of shape (..., in) and W of shape (out, in); a gradient for x alone."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call,no-any-return]
    return _linear(x, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(grad, weight.t(), None), None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
