"""Tells one set of weights from another. Knows torch modules; nothing of prefixes or tokenizers."""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict

import torch
from torch import Tensor, nn

_ATTACHED = "antefix."
_PROBES = 8
_MADE_FROM = "antefix_made_from"
"""Where a model keeps the fingerprint it was made from: in itself, so that a copy has it too."""
_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell one set of weights from another.

    Hashes names, shapes and one value of every row, rounded to bfloat16: fast, equal for float32 and
    bfloat16 copies of the same weights (not for float16), and a changed row is noticed with the chance that
    its drawn value changed. Tied weights count once; what is attached to the model does not count.

    Remembered for a model until its weights change. A change in place is seen by torch's own counter; one behind
    its back (`parameter.data.add_(delta)`) by a few probed values of each tensor.
    """
    if _MADE_FROM in model.__dict__:
        return str(model.__dict__[_MADE_FROM])
    parameters = {n: p.detach() for n, p in sorted(model.named_parameters()) if not n.startswith(_ATTACHED)}
    state = _state(parameters)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = (state, _digest(parameters))
    return known[1]


def keep_fingerprint(model: nn.Module) -> None:
    """From here on the model answers with the fingerprint it has now: what is quantised is still the same base."""
    model.__dict__[_MADE_FROM] = fingerprint(model)


def _digest(parameters: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        if parameter.numel() == 0:
            continue
        rows = parameter.reshape(parameter.shape[0] if parameter.ndim else 1, -1)
        columns = torch.arange(rows.shape[0], device=rows.device) * 2_654_435_761 % rows.shape[1]
        drawn = rows.gather(1, columns[:, None]).to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(drawn.numpy().astype("<i2", copy=False).tobytes())
    return digest.hexdigest()[:16]


def _state(parameters: dict[str, Tensor]) -> object:
    """Something that is equal as long as the weights are."""
    probes: dict[torch.device, list[Tensor]] = defaultdict(list)
    marks = []
    for name, parameter in parameters.items():
        version = -1 if parameter.is_inference() else parameter._version
        marks.append((name, parameter.data_ptr(), version, parameter.dtype))
        probes[parameter.device].append(parameter.reshape(-1)[:: max(1, parameter.numel() // _PROBES)])
    drawn = [torch.cat(group).float().cpu().numpy().tobytes() for group in probes.values()]
    return marks, drawn
