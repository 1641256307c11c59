"""From a request and the ids of its prompts to jobs for the engine."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antefix.decoding import Decoding
from antefix.errors import RecipeError
from antefix.server.messages import Job, Sampling
from antefix.server.refusal import Refusal
from antefix.server.writing import Choice
from antefix.settings import validated

if TYPE_CHECKING:
    from antefix.prefix import Card
    from antefix.server.models import Chosen
    from antefix.server.replies import Usage
    from antefix.server.serving import Serving
    from antefix.server.wire import Asked

_NOT_SERVED = ("num_beams", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "frames")
"""Of a card's decoding: what rows that join and leave a batch are not decoded with."""
_SEEDS = 2**63


@dataclass(frozen=True)
class Asking:
    """One request's choices, and what is told beside them."""

    chosen: Chosen
    choices: tuple[Choice, ...]
    num_prompts: int
    num_prompt_tokens: int
    not_applied: tuple[str, ...]
    """Of the card's decoding, which `antefix generate` would follow."""

    def usage(self) -> Usage:
        """As far as the choices are written."""
        written = sum(choice.num_tokens for choice in self.choices)
        slots = max(choice.num_slots for choice in self.choices) * self.num_prompts  # all carry the same prefixes
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.num_prompt_tokens + written,
            "prompt_tokens_details": {"cached_tokens": 0, "prefix_tokens": slots},
        }


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the endpoints say in ways of their own."""

    max_tokens: int | None
    """None: what the card says, else as much as fits, up to the server's own limit."""
    logprobs: int | None = None
    echo: bool = False
    strip: bool = False
    """Without the spaces around the text, as `antefix.generate` gives it: they are the text format's."""


def asking(
    serving: Serving, asked: Asked, chosen: Chosen, prompts: Sequence[tuple[int, ...]], wanted: Wanted
) -> Asking:
    """The jobs of a request: for every prompt `n` of them. Raises Refusal for what no engine needs to look at."""
    cards = [serving.models.card(name) for name in chosen.prefixes]
    decoding = decoding_of(cards)
    for prompt in prompts:
        if not prompt:
            raise Refusal(400, "the prompt has no tokens", param="prompt")
        serving.tokens.refuse_unknown(prompt, "prompt")
    biases = {int(token): bias for token, bias in asked.logit_bias.items()}
    serving.tokens.refuse_unknown(list(biases), "logit_bias")
    slots = sum(card.num_virtual_tokens or 0 for card in cards)
    request_id = uuid.uuid4().hex
    choices = []
    for place, prompt in enumerate(prompts):
        for copy in range(asked.n):
            index = place * asked.n + copy
            sampling = Sampling(
                max_tokens=_max_tokens(serving, wanted, decoding, prompt, cards),
                temperature=_temperature(asked, decoding),
                top_p=(asked.top_p if asked.top_p is not None else _card_top_p(decoding)) or 1.0,
                seed=None if asked.seed is None else _seed(asked.seed, copy),
                frequency_penalty=asked.frequency_penalty,
                presence_penalty=asked.presence_penalty,
                logit_bias=biases,
                logprobs=wanted.logprobs,
                prompt_logprobs=wanted.echo and wanted.logprobs is not None,
                # Whoever has a text scored cuts the one written token off: it must be there, even if it ends the text.
                ignore_eos=asked.ignore_eos or (wanted.echo and wanted.logprobs is not None and wanted.max_tokens == 1),
            )
            job = Job(f"{request_id}-{index}", prompt, chosen.prefixes, sampling)
            choices.append(
                Choice(
                    index, job, serving.tokens, stops=asked.stops, echo=wanted.echo, strip=wanted.strip, num_slots=slots
                )
            )
    return Asking(chosen, tuple(choices), len(prompts), sum(map(len, prompts)), _not_applied(decoding))


def decoding_of(cards: Sequence[Card]) -> Decoding | None:
    """The decoding of the first prefix that has one. Raises Refusal for one that cannot be read."""
    for card in cards:
        if card.decoding:
            try:
                return validated(Decoding, dict(card.decoding), "decoding option ")
            except RecipeError as error:
                raise Refusal(400, f"the prefix's card: {error}", param="model", code="broken_prefix") from error
    return None


def _temperature(asked: Asked, decoding: Decoding | None) -> float:
    if asked.top_p == 0:
        return 0.0
    if asked.temperature is not None:
        return asked.temperature
    if decoding is None:
        return 1.0
    return decoding.temperature if decoding.do_sample else 0.0


def _card_top_p(decoding: Decoding | None) -> float:
    return decoding.top_p if decoding is not None and decoding.do_sample else 1.0


def _seed(seed: int, copy: int) -> int:
    """Copies draw unlike texts, the same ones each time."""
    return (seed + copy) % _SEEDS


def _max_tokens(
    serving: Serving, wanted: Wanted, decoding: Decoding | None, prompt: tuple[int, ...], cards: Sequence[Card]
) -> int:
    if wanted.max_tokens is not None:
        return wanted.max_tokens
    most = decoding.max_new_tokens if decoding is not None else serving.rules.default_max_tokens
    if serving.tokens.context_length is None:
        return most
    shifted = sum(card.num_virtual_tokens or 0 for card in cards if card.positions == "shifted")
    return max(1, min(most, serving.tokens.context_length - shifted - len(prompt)))


def _not_applied(decoding: Decoding | None) -> tuple[str, ...]:
    if decoding is None:
        return ()
    usual = Decoding.model_validate({})
    found = [name for name in _NOT_SERVED if getattr(decoding, name) != getattr(usual, name)]
    return (*found, "top_k") if decoding.do_sample and decoding.top_k else tuple(found)
