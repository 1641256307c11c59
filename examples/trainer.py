"""Train a prefix with transformers' own `Trainer`: an attached base is an ordinary model.

python examples/trainer.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import antefix
from antefix.base import Base
from antefix.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig

TEXTS = [
    "name : Fern Hill | food : Italian => Fern Hill serves Italian food.",
    "name : Mill Inn | food : Indian => Mill Inn serves Indian food.",
    "name : Old Quay | food : French => Old Quay serves French food.",
    "name : Plum Tree | food : Chinese => Plum Tree serves Chinese food.",
]


def main(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int = 10) -> PrefixTuning:
    """A prefix for TEXTS; the model's own weights stay as they are."""
    prefix = PrefixTuning.build(Base(model, tokenizer, "example"), PrefixTuningConfig(num_virtual_tokens=10))
    rows = [tokenizer(text + tokenizer.eos_token) for text in TEXTS]
    with TemporaryDirectory() as folder, antefix.attached(model, prefix):
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(Path(folder)),
                learning_rate=PrefixTuning.default_learning_rate(prefix.config),
                per_device_train_batch_size=4,
                max_steps=steps,
                logging_steps=max(1, steps // 5),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    return prefix


if __name__ == "__main__":
    base = antefix.load_base("smollm2-135m")
    main(base.model, base.tokenizer)
