"""A BART of ten million weights that has learnt some English: the encoder-decoder that experiments here start from.

    python experiments/small_bart.py path/to/webnlg path/to/dart

Denoising (Lewis et al. 2020, arXiv 1910.13461: spans of 30 % of the tokens, their lengths from Poisson(3), each become
one mask) on the texts of WebNLG's training set and of DART's dev and test files, without what these have from E2E:
that is the new task of the experiments. A row is one to four texts, so that positions up to their length are learned
too. Keeps model and tokenizer in `experiments/work/small_bart/`, figures in `results/small_bart.json`; half an hour on
two cores. Interrupted, it goes on from its last checkpoint.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BartConfig, BartForConditionalGeneration, BartTokenizerFast, get_linear_schedule_with_warmup

from antefix import atomic

from units import ROOT, commit, made_with  # isort: skip

FOLDER = ROOT / "experiments" / "work" / "small_bart"
CHECKPOINT, MODEL = FOLDER / "checkpoint.pt", FOLDER / "model"
RESULT = ROOT / "results" / "small_bart.json"
VOCABULARY, LONGEST, MOST_TEXTS = 6000, 64, 4
STEPS, ROWS, WARMUP, RATE = 1500, 48, 150, 1e-3
INIT_STD = 0.04
"""BART's own 0.02 is for rows four times as wide: at this width all scores of cross-attention start out near zero, and
the decoder learns the texts by heart before it looks at its encoder."""
MASKED, SPAN = 0.3, 3.0
SECONDS_BETWEEN_CHECKPOINTS = 60
DEV_ROWS = 480
PAD, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if MODEL.exists():
        sys.exit(f"{MODEL} is there")
    texts = corpus(Path(sys.argv[1]), Path(sys.argv[2]))
    tokenizer = learnt_tokenizer(texts)
    ids = [tokenizer(t, truncation=True, max_length=LONGEST)["input_ids"] for t in texts]
    dev, train = ids[:DEV_ROWS], ids[DEV_ROWS:]
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config(tokenizer))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} weights, {len(train):,} texts, {sum(map(len, train)):,} tokens", flush=True)
    seconds = trained(model, train, tokenizer)
    found = {
        "weights": size, "texts": len(train), "steps": STEPS, "rows_a_step": ROWS, "minutes": round(seconds / 60, 1),
        "dev_denoising_loss": dev_loss(model, dev, tokenizer),
        "with_another_source": dev_loss(model, dev, tokenizer, turned=1),
        "dev_denoising_loss_of_four_texts": dev_loss(model, joined(dev, MOST_TEXTS), tokenizer),
        "commit": commit(), "made_with": made_with(),
    }  # fmt: skip
    atomic.write_bytes(RESULT, f"{json.dumps(found, indent=1)}\n".encode())
    scratch = MODEL.with_suffix(".tmp")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(MODEL)


def trained(model: BartForConditionalGeneration, train: Sequence[list[int]], tokenizer: BartTokenizerFast) -> float:
    """The seconds that all steps took, those before an interruption included."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimiser, WARMUP, STEPS)
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, seconds = 0, 0.0
    if CHECKPOINT.exists():
        kept = torch.load(CHECKPOINT, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        first, seconds = kept["step"], kept["seconds"]
    started = saved = time.perf_counter()
    for step in range(first, STEPS):
        model.train()
        rows = joined(rows_of_step(train, step), 1 + step % MOST_TEXTS)
        loss = denoising_loss(model, rows, tokenizer, seed=step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        now = time.perf_counter()
        if now - saved > SECONDS_BETWEEN_CHECKPOINTS or step + 1 == STEPS:
            so_far = seconds + now - started
            scratch = CHECKPOINT.with_suffix(".tmp")
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "step": step + 1, "seconds": so_far}, scratch)
            scratch.replace(CHECKPOINT)
            saved = now
            left = (now - started) / (step + 1 - first) * (STEPS - step - 1)
            print(f"step {step + 1}/{STEPS}, loss {loss.item():.3f}, {left / 60:.0f} min left", flush=True)
    return seconds + time.perf_counter() - started


def corpus(webnlg: Path, dart: Path) -> list[str]:
    """Every text once, in an order of its own; nothing of E2E."""
    texts = [lex["text"] for row in _rows(webnlg / "train.jsonl.gz") for lex in row["lexs"]]
    for name in ("dev", "test"):
        for row in _rows(dart / f"dart-v1.1.1-{name}.jsonl.gz"):
            texts += [lex["text"] for lex in row["lexs"] if "e2e" not in lex["source"].lower()]
    unique = sorted(set(texts))
    random.Random(0).shuffle(unique)
    return unique


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def learnt_tokenizer(texts: Sequence[str]) -> BartTokenizerFast:
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[START, PAD, END, "<unk>", MASK])
    FOLDER.mkdir(parents=True, exist_ok=True)
    learner.save_model(str(FOLDER))
    return BartTokenizerFast(str(FOLDER / "vocab.json"), str(FOLDER / "merges.txt"), model_max_length=512)


def config(tokenizer: BartTokenizerFast) -> BartConfig:
    return BartConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, d_model=256, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024,
        dropout=0.1, init_std=INIT_STD, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def rows_of_step(train: Sequence[list[int]], step: int) -> list[list[int]]:
    """Every text once an epoch, of like lengths in a step."""
    in_epoch = len(train) // ROWS
    draw = random.Random(f"epoch-{step // in_epoch}")
    order = sorted(draw.sample(range(len(train)), in_epoch * ROWS), key=lambda n: len(train[n]))
    starts = draw.sample(range(in_epoch), in_epoch)
    start = starts[step % in_epoch] * ROWS
    return [train[n] for n in order[start : start + ROWS]]


def denoising_loss(
    model: BartForConditionalGeneration, rows: Sequence[list[int]], tokenizer: BartTokenizerFast, seed: int,
    *, turned: int = 0,
) -> Tensor:  # fmt: skip
    """turned: every row gets the source of the one so many places further on."""
    draw = np.random.default_rng(seed)
    pad = tokenizer.pad_token_id
    sources = [masked(ids, tokenizer.mask_token_id, draw) for ids in rows]
    noisy = padded([*sources[turned:], *sources[:turned]], pad)
    labels = padded(rows, -100)
    loss: Tensor = model(input_ids=noisy, attention_mask=(noisy != pad).long(), labels=labels).loss
    return loss


def joined(rows: Sequence[list[int]], together: int) -> list[list[int]]:
    """So many texts a row, what is left over in a shorter one."""
    groups = [rows[n : n + together] for n in range(0, len(rows), together)]
    return [[group[0][0], *(token for row in group for token in row[1:-1]), group[0][-1]] for group in groups]


def masked(ids: list[int], mask: int, draw: np.random.Generator) -> list[int]:
    """Spans of the tokens between the first and the last become one mask each."""
    inner = ids[1:-1]
    left = round(MASKED * len(inner))
    while left > 0:
        length = min(max(1, int(draw.poisson(SPAN))), left)
        start = int(draw.integers(max(1, len(inner) - length + 1)))
        inner[start : start + length] = [mask]
        left -= length
    return [ids[0], *inner, ids[-1]]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


@torch.no_grad()
def dev_loss(
    model: BartForConditionalGeneration, dev: Sequence[list[int]], tokenizer: BartTokenizerFast, turned: int = 0
) -> float:
    """Mean over batches, nats a token. turned: see `denoising_loss`; by how much it is higher is what is read."""
    model.eval()
    starts = range(0, len(dev), ROWS)
    losses = [denoising_loss(model, dev[s : s + ROWS], tokenizer, STEPS + s, turned=turned) for s in starts]
    return sum(map(float, losses)) / len(losses)


if __name__ == "__main__":
    main()
