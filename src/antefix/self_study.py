"""Self-study: the base asks about pieces of a document and answers with them in context (Cartridges, section 4).

A conversation is a question and an answer as token ids, with the likeliest tokens that the base, with the piece in
context, gives every token of the answer. Those that are made together are a function of the document, the seed and
their numbers: asked for the same numbers at once, the base makes the same conversations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from antefix.base import Base
from antefix.data.encode import EncodedExample, SoftLabel
from antefix.errors import BaseModelError
from antefix.sites import find_sites

TOPICS = {
    "structuring": "Ask for one part of the text above to be put into a list or a table, and name that part.",
    "summary": "Ask for a summary of one part of the text above, and name that part.",
    "question": "Ask one question about a fact in the text above. Name what it is about.",
    "use": "Ask how something that the text above tells could be used, and name it.",
    "creative": "Ask for something creative to be made of the text above, and say of which part.",
}
"""What the asking side is told; five kinds, as in the paper."""
TOP = 20
"""Tokens a place whose probabilities are kept, as released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """How a base studies a document."""

    chunk_tokens: tuple[int, int] = (256, 1024)
    """The shortest and the longest piece; the paper takes 512 to 4,096."""
    question_tokens: int = 48
    answer_tokens: int = 96
    temperature: float = 0.6
    """Of questions; answers are greedy."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was asked and answered, as the base reads it without the document."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    top: tuple[SoftLabel, ...]
    """For every token of the answer."""

    def encoded(self) -> EncodedExample:
        """As an example to train on."""
        return EncodedExample(self.prompt, (self.answer,), (self.top,))


def longest_chunk(base: Base, study: Study) -> int:
    """How many tokens of a document fit into the base's context beside a conversation.

    Raises BaseModelError for a base that cannot converse, or in whose context there is no room.
    """
    if not find_sites(base.model).is_causal:
        raise BaseModelError(f"the base '{base.name}' does not write from left to right: take a chat model")
    if base.tokenizer.chat_template is None:
        raise BaseModelError(f"the base '{base.name}' has no chat template: take a chat model")
    if base.context_length is None:
        return max(study.chunk_tokens)
    spoken = max(len(chat_ids(base, ask)) for ask in TOPICS.values()) + study.question_tokens + study.answer_tokens
    room = base.context_length - spoken
    if room < 1:
        raise BaseModelError(
            f"the context of '{base.name}' ({base.context_length} tokens) holds no document beside a conversation of "
            f"{spoken}: take a base with a longer one"
        )
    return room


@torch.no_grad()
def converse(base: Base, document: Sequence[int], study: Study, numbers: Sequence[int]) -> list[Conversation]:
    """The conversations of these numbers, all at once. Raises BaseModelError for a base that cannot converse.

    document: its token ids. What attends to the document has it right before the conversation.
    """
    room = longest_chunk(base, study)
    chunks, asks = [], []
    for number in numbers:
        draw = random.Random(f"study-{study.seed}-{number}")
        low, high = (min(n, len(document), room) for n in study.chunk_tokens)
        length = draw.randint(low, high)
        first = draw.randint(0, len(document) - length)
        chunks.append(list(document[first : first + length]))
        asks.append(draw.choice(list(TOPICS.values())))
    torch.manual_seed(study.seed * 1_000_003 + numbers[0])
    questions = _written(
        base, [c + chat_ids(base, a) for c, a in zip(chunks, asks, strict=True)], study.question_tokens,
        do_sample=True, temperature=study.temperature,
    )  # fmt: skip
    texts = [str(base.tokenizer.decode(q, skip_special_tokens=True)).strip() for q in questions]
    prompts = [chat_ids(base, text or "What is this about?") for text in texts]
    contexts = [c + p for c, p in zip(chunks, prompts, strict=True)]
    answers = _written(base, contexts, study.answer_tokens, do_sample=False)
    tops = top_tokens(base, contexts, answers)
    return [
        Conversation(tuple(p), tuple(a), top) for p, a, top in zip(prompts, answers, tops, strict=True) if len(a) > 1
    ]


def chat_ids(base: Base, text: str) -> list[int]:
    """A user's turn in the base's own template, ready to be answered."""
    messages = [{"role": "user", "content": text}]
    return list(base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def top_tokens(
    base: Base, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], top: int = TOP
) -> list[tuple[SoftLabel, ...]]:
    """What the base gives every token of these answers after their contexts: the likeliest tokens, probabilities."""
    found = []
    for context, answer in zip(contexts, answers, strict=True):
        ids = torch.tensor([[*context, *answer[:-1]]], device=base.model.device)
        logits = base.model(ids, logits_to_keep=len(answer), use_cache=False).logits[0].float()
        values, tokens = torch.softmax(logits, -1).topk(min(top, logits.shape[-1]))
        rows = zip(tokens.tolist(), values.tolist(), strict=True)
        found.append(tuple(tuple(zip(t, [round(v, 6) for v in vs], strict=True)) for t, vs in rows))
    return found


def _written(base: Base, prompts: Sequence[Sequence[int]], num_tokens: int, **options: object) -> list[list[int]]:
    """What the base writes after each, up to and with its end token."""
    pad, width = base.tokenizer.pad_token_id, max(map(len, prompts))
    end = base.tokenizer.eos_token_id
    out = base.model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=base.model.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.model.device),
        max_new_tokens=num_tokens, pad_token_id=pad, eos_token_id=end, **options,
    )  # fmt: skip
    rows: list[list[int]] = out[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
