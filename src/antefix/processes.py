"""Several processes that train as one: who speaks and writes, who does which share, and how all learn of it.

Started with `accelerate launch` or `torchrun`. All processes must come to the same calls in the same order, else they
wait for each other. In a single process everything here is free and changes nothing. Knows no model and no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, parse_flag_from_env, reduce
from torch import Tensor, nn

from antefix.errors import AntefixError, OtherProcessError, TrainingError

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process speaks and writes for all of them."""
    return bool(_state().is_main_process)


def num_processes() -> int:
    """How many train as one."""
    return int(_state().num_processes)


def check_alone(what: str, instead: str = "start it without a launcher") -> None:
    """Raises TrainingError where a launcher started several processes: this would do the same in each of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by accelerate launch and torchrun
        raise TrainingError(f"{what} runs in one process: {instead}")


def device() -> torch.device:
    """Where this process computes."""
    found: torch.device = _state().device
    return found


def on_processor() -> bool:
    """Whether Accelerate is to leave accelerators alone: it was told so, or several processes have none to work on.

    Accelerate joins processes on the processor only if it is told; else each would train for itself, all as main ones.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return "LOCAL_RANK" in os.environ and (found is None or found.type == "mps")


def shared(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every n-th of the items."""
    state = _state()
    return items[state.process_index :: state.num_processes]


def rejoined(share: Sequence[T]) -> list[T]:
    """What `shared` took apart, in every process: one thing for each of the items, in their order."""
    shares = gathered(list(share))
    whole: list[T | None] = [None] * sum(map(len, shares))
    for index, part in enumerate(shares):
        whole[index :: len(shares)] = part
    return cast(list[T], whole)


def gathered(value: T) -> list[T]:
    """Every process's value, in every process; small things that are no tensors."""
    return [value] if _state().num_processes == 1 else cast(list[T], gather_object([value]))


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over all processes, in one message. Tensors of one precision."""
    if _state().num_processes == 1:
        return list(tensors)
    total = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "sum")
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Give every process the gradients of all of them, and return the sum of their losses.

    A process that had nothing to do for a step has no gradients, and takes part with zeros.
    """
    if _state().num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    loss, *gradients = summed([loss, *gradients])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return loss


@torch.no_grad()
def take_from_main(module: nn.Module) -> None:
    """Give every process the main one's values: first values may differ in a last digit from machine to machine."""
    if _state().num_processes > 1:
        for tensor in module.state_dict().values():
            broadcast(tensor)


@contextmanager
def failing_together() -> Iterator[None]:
    """An error of ours that ends one process in here ends all of them at the end of the block, and is said once.

    The first process that failed raises its error, all others OtherProcessError. Nobody leaves before all have come, so
    what one process does in here is done for those who go on. What else goes wrong ends its process at once, and the
    launcher ends the others.
    """
    failure: AntefixError | None = None
    try:
        yield
    except AntefixError as error:
        failure = error
    failed = [index for index, has_failed in enumerate(gathered(failure is not None)) if has_failed]
    if failure is not None and failed[0] == _state().process_index:
        raise failure
    if failed:
        raise OtherProcessError(f"process {failed[0]} ended with an error, and says which") from failure


def leave() -> None:
    """The last call: this process will share nothing any more."""
    _state().destroy_process_group()


def _state() -> PartialState:
    return PartialState(cpu=on_processor())
