"""Sampling in a batch: each row's own settings, as transformers' `generate` would do them for that row alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import tiny_base
from serving import add_prefix, alone, end_of, greedy, loop_over, run_all, some_prompt, tokens_of
from transformers import LogitsProcessor, SequenceBiasLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from antefix.attach import attached
from antefix.bank import Bank
from antefix.base import Base
from antefix.server.loop import Loop
from antefix.server.messages import Event, Finished, Job, PromptScored, Sampling, Token
from antefix.server.sampling import Sampler, likeliest

PROMPT = some_prompt(9, seed=1)
BARE = "bare"


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def bank(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    bank = Bank(tmp_path_factory.mktemp("served") / "bank")
    add_prefix(bank, "menus", base)
    add_prefix(bank, "scales", base, "ia3")
    return bank


def written(loop: Loop, sampling: Sampling, name: str = BARE, beside: Sequence[Job] = ()) -> list[int]:
    """What a job writes beside these neighbours."""
    loop.add(Job("job", PROMPT, () if name == BARE else (name,), sampling))
    for other in beside:
        loop.add(other)
    events = run_all(loop)
    loop.close()
    assert isinstance(end_of(events, "job"), Finished)
    return tokens_of(events, "job")


NEIGHBOURS = [
    Job("a", some_prompt(20, seed=2), ("menus",), Sampling(max_tokens=3, seed=8)),
    Job("b", some_prompt(2, seed=3), ("scales",), Sampling(max_tokens=20, temperature=2.0)),
    Job("c", some_prompt(5, seed=4), (), greedy(9)),
]


@pytest.mark.parametrize("name", [BARE, "menus", "scales"])
def test_a_seed_draws_the_same_whoever_the_neighbours_are(base: Base, bank: Bank, name: str) -> None:
    def drawn(seed: int, beside: Sequence[Job] = ()) -> list[int]:
        sampling = Sampling(max_tokens=12, temperature=8.0, top_p=0.9, seed=seed, ignore_eos=True)
        return written(loop_over(base, bank), sampling, name, beside)

    assert drawn(1) == drawn(1) == drawn(1, NEIGHBOURS) != drawn(2)


def test_without_a_seed_every_draw_is_another(base: Base, bank: Bank) -> None:
    sampling = Sampling(max_tokens=12, temperature=3.0, ignore_eos=True)
    assert written(loop_over(base, bank), sampling) != written(loop_over(base, bank), sampling)


def test_top_p_of_nothing_and_a_temperature_of_nothing_take_the_likeliest(base: Base, bank: Bank) -> None:
    likeliest_ids = written(loop_over(base, bank), greedy(12))
    assert written(loop_over(base, bank), Sampling(max_tokens=12, top_p=0.0)) == likeliest_ids
    for temperature in (1e-4, 1e-40, 5e-324):
        assert written(loop_over(base, bank), Sampling(max_tokens=12, temperature=temperature)) == likeliest_ids


class Penalties(LogitsProcessor):
    """The formula of the OpenAI API over what was written, counted anew from the ids at every token."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            for token in set(ids):
                scores[row, token] -= ids.count(token) * self.frequency + self.presence
        return scores


@pytest.mark.parametrize(("frequency", "presence"), [(6.0, 0.0), (0.0, 6.0), (-4.0, 1.0)])
@pytest.mark.parametrize("name", [BARE, "menus"])
def test_penalties_are_those_of_generate(
    base: Base, bank: Bank, name: str, frequency: float, presence: float
) -> None:  # fmt: skip
    sampling = greedy(40, frequency_penalty=frequency, presence_penalty=presence)
    job = Job("job", PROMPT, () if name == BARE else (name,), sampling)
    expected, _ = alone(base, bank, job, logits_processor=[Penalties(len(PROMPT), frequency, presence)])
    assert written(loop_over(base, bank), sampling, name, NEIGHBOURS) == expected
    assert expected != written(loop_over(base, bank), greedy(40), name)


def test_logit_bias_is_that_of_generate(base: Base, bank: Bank) -> None:
    plain = written(loop_over(base, bank), greedy(15))
    bias = {plain[0]: -100.0, plain[3]: -2.0, 77: 2.5}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected, _ = alone(base, bank, Job("job", PROMPT, (), greedy(15)), logits_processor=[processor])
    assert written(loop_over(base, bank), greedy(15, logit_bias=bias), beside=NEIGHBOURS) == expected != plain


def test_draws_follow_the_distribution_of_transformers_warpers() -> None:
    logits_V = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, logits_V[None]))[0]  # type: ignore[arg-type]
    count = 2000
    sampler = Sampler(Sampling(max_tokens=count, temperature=0.7, top_p=0.8, seed=5))
    drawn = torch.tensor([sampler.next(logits_V)[0] for _ in range(count)])
    shares = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(shares, torch.softmax(warped, 0), atol=0.04, rtol=0)
    assert set(drawn.tolist()) == set(torch.isfinite(warped).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", [BARE, "menus"])
def test_logprobs_are_those_of_a_plain_forward_pass(base: Base, bank: Bank, name: str) -> None:
    sampling = Sampling(
        max_tokens=6, temperature=0.5, top_p=0.7, seed=3, frequency_penalty=1.0, logprobs=4, prompt_logprobs=True,
        ignore_eos=True,
    )  # fmt: skip
    loop = loop_over(base, bank)
    for job in (*NEIGHBOURS, Job("job", PROMPT, () if name == BARE else (name,), sampling)):
        loop.add(job)
    events = run_all(loop)
    loop.close()
    tokens = [e for e in events if isinstance(e, Token) and e.job == "job"]
    (scored,) = [e for e in events if isinstance(e, PromptScored)]
    ids = torch.tensor([[*PROMPT, *(token.id for token in tokens)]])
    with torch.no_grad():
        if name == BARE:
            logprobs = base.model(ids).logits[0].log_softmax(-1)
        else:
            with attached(base.model, bank[name]):
                logprobs = base.model(ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert scored.logprobs[0] is None
    assert scored.top[0] == ()
    found = [*scored.logprobs[1:], *(token.logprob for token in tokens)]
    assert found == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate([*scored.top[1:], *(token.top for token in tokens)]):
        values, best = logprobs[place].topk(4)
        assert [token for token, _ in top] == best.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_prompt_alone_can_be_scored(base: Base, bank: Bank) -> None:
    loop = loop_over(base, bank)
    long = some_prompt(200, seed=6)  # more than are scored at once
    loop.add(Job("job", long, ("menus",), greedy(0, prompt_logprobs=True)))
    events: list[Event] = run_all(loop)
    loop.close()
    with attached(base.model, bank["menus"]), torch.no_grad():
        logprobs = base.model(torch.tensor([long])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(long)[1:, None])[:, 0].tolist()
    scored, finished = events
    assert isinstance(scored, PromptScored)
    assert list(scored.logprobs[1:]) == pytest.approx(expected, abs=1e-4)
    assert set(scored.top) == {()}
    assert finished == Finished("job", "length", 5)


def test_impossible_tokens_are_not_told() -> None:
    assert likeliest(torch.tensor([-torch.inf, -0.5, -2.0]), 5) == ((1, -0.5), (2, -2.0))
