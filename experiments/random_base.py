"""A base of random weights, for measuring speed at sizes whose weights are not at hand.

    python experiments/random_base.py 1.3b TOKENIZER FOLDER

Llama-shaped, bfloat16, with the vocabulary of the tokenizer in the folder TOKENIZER (that of the embedded model lies in
the folder that `antefix base fetch` names).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 28, "num_attention_heads": 32,
             "num_key_value_heads": 8},
}  # fmt: skip
"""The first is SmolLM2-135M's."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    size, tokenizer, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    config = LlamaConfig(
        vocab_size=49152, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, **SHAPES[size],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {folder}")


if __name__ == "__main__":
    main()
