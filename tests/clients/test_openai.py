"""The openai package against the running server: sync, async, streams, errors, as its users write it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from served import Served, base_of_server

import antefix

openai = pytest.importorskip("openai")


@pytest.fixture
def client(served: Served) -> Any:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def alone(served: Served, name: str | None, source: Any, num_tokens: int) -> str:
    """The same text by `antefix.generate` in this process."""
    base = base_of_server()
    decoding = antefix.Decoding(max_new_tokens=num_tokens)
    if name is None:
        return antefix.generate(base, [source], decoding=decoding)[0]
    with antefix.attached(base.model, served.bank[name]):
        return antefix.generate(base, [source], decoding=decoding)[0]


def test_models(client: Any) -> None:
    found = {model.id: model for model in client.models.list()}
    assert found["tiny-llama:menus"].parent == "tiny-llama"
    assert client.models.retrieve("tiny-llama:menus").root == "menus"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tiny-llama:none")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["menus", "sport", "talk"])
def test_a_greedy_text_is_that_of_the_library(client: Any, served: Served, name: str) -> None:
    source: Any = antefix.data.Table.of({"name": "Fern Hill"}) if name == "menus" else "Fern Hill"
    content = "name: Fern Hill" if name == "menus" else source
    found = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], max_completion_tokens=12, temperature=0
    )
    assert found.choices[0].message.content == alone(served, name, source, 12)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.prefix_tokens == served.bank.card(name).config["num_virtual_tokens"]


def test_a_stream_is_the_text(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 20,
        "seed": 4,
        "temperature": 1.0,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    written = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert written == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_scores_of_both_forms_agree(client: Any) -> None:
    prompt = "user: hi\nassistant: "
    legacy = client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=6, logprobs=2, temperature=0)
    chat = client.chat.completions.create(
        model="tiny-llama", messages=[{"role": "user", "content": "hi"}], max_tokens=6, logprobs=True, top_logprobs=2,
        temperature=0,
    )  # fmt: skip
    found = [one.logprob for one in chat.choices[0].logprobs.content]
    assert found == pytest.approx(legacy.choices[0].logprobs.token_logprobs, abs=1e-4)
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_hundred_streams_at_once_are_each_as_alone(served: Served) -> None:
    async def ask(client: Any, n: int) -> tuple[list[str], list[float]]:
        """The tokens, and by how much each was likelier than the next one."""
        stream = await client.completions.create(
            model=["tiny-llama", "menus", "sport", "talk"][n % 4], prompt=f"{n} is", max_tokens=5 + n % 17,
            temperature=0, stream=True, logprobs=2,
        )  # fmt: skip
        scores = [chunk.choices[0].logprobs async for chunk in stream]
        best = [sorted(top.values()) for one in scores if one for top in one.top_logprobs]
        return [t for one in scores if one for t in one.tokens], [top[-1] - top[-2] for top in best]

    async def all_of_them() -> list[tuple[list[str], list[str], list[float]]]:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="none", timeout=60) as client:
            together = await asyncio.gather(*(ask(client, n) for n in range(100)))
            return [(tokens, *await ask(client, n)) for n, (tokens, _) in enumerate(together)]

    found = asyncio.run(all_of_them())
    for together, alone, margins in found:
        differ = [n for n, (a, b) in enumerate(zip(together, alone, strict=False)) if a != b]
        assert margins[differ[0]] < 1e-4 if differ else together == alone
    assert len({"".join(alone) for _, alone, _ in found}) > 50


def test_what_is_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        client.chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="menus", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="x")


def test_several_prefixes_through_the_extra_body(client: Any) -> None:
    found = client.completions.create(
        model="tiny-llama", prompt="x", max_tokens=3, extra_body={"antefix": {"prefixes": ["menus", "sport"]}}
    )
    assert found.usage.prompt_tokens_details.prefix_tokens == 5
