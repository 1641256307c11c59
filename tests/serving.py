"""What tests of the engine share: a bank of tiny prefixes, a loop over it, and what a job writes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conftest import METHOD_CONFIGS, tiny_method

from antefix.attach import attached
from antefix.bank import Bank
from antefix.base import Base
from antefix.methods import method_class
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.server.loop import Loop
from antefix.server.messages import Event, Failed, Finished, Job, Sampling, Token
from antefix.server.residency import Residency

NEAR_TIE = 1e-4
"""Where the two best logits are nearer than this, either may win."""


def kept(base: Base, method: str = "prefix_tuning", seed: int = 1, **config: Any) -> Prefix:
    """A random prefix as its files have it."""
    module = tiny_method(base, method, seed=seed, **config)
    made_with = method_class(method).Config.model_validate({**METHOD_CONFIGS[method], **config})
    record = BaseRecord(name=base.name, fingerprint=base.fingerprint)
    card = Card(method=method, config=made_with.model_dump(mode="json"), positions=module.positions, base=record)
    return Prefix(module.kept(), card)


def add_prefix(bank: Bank, name: str, base: Base, method: str = "prefix_tuning", seed: int = 1, **config: Any) -> None:
    """A random prefix under this name."""
    bank.add(name, kept(base, method, seed, **config))


def loop_over(base: Base, bank: Bank, *, max_rows: int = 16, prompt_tokens: int = 64, num_bytes: int = 1 << 24) -> Loop:
    residency = Residency(base, bank, num_bytes)
    return Loop(base, residency, max_rows=max_rows, prompt_tokens=prompt_tokens, cache_bytes=1 << 30)


def run_all(loop: Loop, most_steps: int = 2000) -> list[Event]:
    """Until nothing is left to do."""
    events: list[Event] = []
    for _ in range(most_steps):
        if loop.is_idle:
            return events
        events += loop.step()
    raise AssertionError("the loop does not come to an end")


def tokens_of(events: Sequence[Event], job: str) -> list[int]:
    return [event.id for event in events if isinstance(event, Token) and event.job == job]


def end_of(events: Sequence[Event], job: str) -> Finished | Failed:
    (end,) = [e for e in events if isinstance(e, Finished | Failed) and e.job == job]
    return end


def greedy(max_tokens: int, **others: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **others)


def alone(base: Base, bank: Bank, job: Job, **arguments: Any) -> tuple[list[int], torch.Tensor]:
    """What transformers' own `generate` writes for a job, and the logits at every token: (T, V)."""
    prefixes = [bank[name] for name in job.prefixes]
    with torch.no_grad():
        if not prefixes:
            return _generated(base, list(job.prompt), job, arguments)
        (prefix,) = prefixes
        with attached(base.model, prefix) as attachment:
            ids = [*job.prompt, *[base.tokenizer.pad_token_id] * attachment.module_of(0).num_inserted_tokens]
            attachment.source_lengths = len(ids)
            return _generated(base, ids, job, arguments)


def _generated(base: Base, ids: list[int], job: Job, arguments: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    stop = None if job.sampling.ignore_eos else base.tokenizer.eos_token_id
    out = base.model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=job.sampling.max_tokens, eos_token_id=stop, pad_token_id=base.tokenizer.pad_token_id,
        return_dict_in_generate=True, output_logits=True, **{"do_sample": False, **arguments},
    )  # fmt: skip
    written = out.sequences[0, len(ids) :].tolist()
    return [i for i in written if i != stop], torch.cat(out.logits)


def assert_same_text(found: Sequence[int], expected: Sequence[int], logits_TV: torch.Tensor) -> None:
    """Token by token, up to where two tokens were nearly as likely."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            best, second = logits_TV[place].topk(2).values.tolist()
            assert best - second < NEAR_TIE, f"token {place}: {one}, alone {other}"
            return
    if len(found) != len(expected):
        best, second = logits_TV[min(len(found), len(expected))].topk(2).values.tolist()
        assert best - second < NEAR_TIE, f"{len(found)} tokens, alone {len(expected)}"


def some_prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (length,), generator=draw).tolist())
