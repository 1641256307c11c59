"""What a run needs to go on after any interruption, in one atomically written file.

A checkpoint holds the trained parameters, the optimiser's state, the best parameters so far, and the step. The
data's order and every random draw are functions of the seed and the step, so nothing else is needed for a
resumed run to end with the same bits. Only safetensors, never pickle.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from antefix import atomic
from antefix.errors import TrainingError
from antefix.training.recipe import TrainingRecipe

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimiser steps done."""
    best_step: int = 0
    best_score: float | None = None
    """The best dev score, larger is better (a loss counts negative); None before the first evaluation."""
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    """Training time so far, interruptions left out."""
    dev_scores: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False

    def note(self, scores: dict[str, float], recipe: TrainingRecipe) -> bool:
        """Fresh dev scores; True if this is the best step so far. Raises TrainingError for one that is no number."""
        score = scores[f"dev_{recipe.dev_metric}"]
        if not math.isfinite(score):
            raise TrainingError(f"step {self.step}: its dev {recipe.dev_metric} is {score}; lower learning_rate")
        self.dev_scores.append({"step": self.step, **scores})
        if recipe.dev_metric == "loss":
            score = -score
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step, self.evaluations_without_gain = score, self.step, 0
            return True
        self.evaluations_without_gain += 1
        self.stopped_early = recipe.patience is not None and self.evaluations_without_gain >= recipe.patience
        return False


def save_checkpoint(
    path: Path,
    digest: str,
    progress: Progress,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    best: dict[str, Tensor],
) -> None:
    """Write the checkpoint. Raises TrainingError when it cannot be written; the one before is kept."""
    tensors = {f"module.{name}": p.detach() for name, p in module.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in best.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {"digest": digest, "progress": json.dumps(asdict(progress))}
    content = save({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, metadata)
    try:
        atomic.write_bytes(path, content)
    except OSError as error:
        left = "the one before is kept: the same command goes on from it" if path.exists() else "there is none yet"
        raise TrainingError(
            f"{path}: the checkpoint of step {progress.step} could not be written ({error.strerror or error}); {left}"
        ) from error


def load_checkpoint(
    path: Path, digest: str, module: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a checkpoint back; returns the progress and the best tensors.

    Raises TrainingError if the checkpoint belongs to another recipe or is broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: not a readable checkpoint ({error}); remove it to start anew") from error
    if metadata.get("digest") != digest:
        raise of_another_run(path.parent)
    module.load_state_dict(_under("module.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimiser.", tensors).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return Progress(**json.loads(metadata["progress"])), _under("best.", tensors)


def of_another_run(folder: Path) -> TrainingError:
    """What is said where a run would go on from another one's files."""
    return TrainingError(
        f"{folder} holds an unfinished run of another recipe (or data, or precision): finish that one, "
        "give this one another `run` folder, or start anew with --restart"
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
