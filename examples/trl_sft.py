"""Train a prefix with TRL's `SFTTrainer` on prompts and completions: an attached base is an ordinary model.

python examples/trl_sft.py
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import antefix
from antefix.base import Base
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig

PAIRS = [
    {"prompt": "name : Fern Hill | food : Italian\n", "completion": "Fern Hill serves Italian food."},
    {"prompt": "name : Mill Inn | food : Indian\n", "completion": "Mill Inn serves Indian food."},
    {"prompt": "name : Old Quay | food : French\n", "completion": "Old Quay serves French food."},
    {"prompt": "name : Plum Tree | food : Chinese\n", "completion": "Plum Tree serves Chinese food."},
]


def main(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int = 10) -> PrefixTuning:
    """A prefix for PAIRS; the model's own weights stay as they are."""
    prefix = PrefixTuning.build(Base(model, tokenizer, "example"), PrefixTuningConfig(num_virtual_tokens=10))
    with TemporaryDirectory() as folder, antefix.attached(model, prefix):
        trainer = SFTTrainer(
            model,
            SFTConfig(
                output_dir=folder,
                learning_rate=PrefixTuning.default_learning_rate(prefix.config),
                per_device_train_batch_size=4,
                max_steps=steps,
                logging_steps=max(1, steps // 5),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
                activation_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )
        trainer.train()
    return prefix


if __name__ == "__main__":
    base = antefix.load_base("smollm2-135m")
    main(base.model, base.tokenizer)
