"""Train a prefix with a plain PyTorch loop: an attached base is an ordinary model, and the prefix an ordinary module.

python examples/pytorch_loop.py
"""

from __future__ import annotations

from itertools import cycle, islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import antefix
from antefix.base import Base
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig

PAIRS = [
    ("name : Fern Hill | food : Italian =>", " Fern Hill serves Italian food."),
    ("name : Mill Inn | food : Indian =>", " Mill Inn serves Indian food."),
    ("name : Old Quay | food : French =>", " Old Quay serves French food."),
    ("name : Plum Tree | food : Chinese =>", " Plum Tree serves Chinese food."),
]
IGNORED = -100
"""The label of what is not learned, as transformers has it."""


def main(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int = 20) -> PrefixTuning:
    """A prefix for PAIRS; the model's own weights stay as they are."""
    prefix = PrefixTuning.build(Base(model, tokenizer, "example"), PrefixTuningConfig(num_virtual_tokens=10))
    rate = PrefixTuning.default_learning_rate(prefix.config)
    optimiser = torch.optim.AdamW(prefix.parameters(), lr=rate, weight_decay=0.0)
    with antefix.attached(model, prefix):
        for step, (source, target) in enumerate(islice(cycle(PAIRS), steps)):
            read, written = tokenizer(source)["input_ids"], tokenizer(target + tokenizer.eos_token)["input_ids"]
            ids = torch.tensor([read + written], device=model.device)
            labels = torch.tensor([[IGNORED] * len(read) + written], device=model.device)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prefix.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            if step % 4 == 3:
                print(f"step {step + 1}: loss {loss.item():.3f}")
    return prefix


if __name__ == "__main__":
    base = antefix.load_base("smollm2-135m")
    main(base.model, base.tokenizer)
