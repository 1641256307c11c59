"""LangChain's OpenAI client against the running server."""

from __future__ import annotations

from typing import Any

import pytest
from served import Served

langchain_openai = pytest.importorskip("langchain_openai")


@pytest.fixture
def chat(served: Served) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=f"{served.address}/v1", api_key="none", model="talk", temperature=0, max_tokens=8, max_retries=0
    )


def test_a_turn_and_a_stream(chat: Any) -> None:
    whole = chat.invoke([("user", "hello")])
    assert whole.response_metadata["finish_reason"] in ("length", "stop")
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in chat.stream([("user", "hello")])) == whole.content


def test_a_completion(served: Served) -> None:
    model = langchain_openai.OpenAI(
        base_url=f"{served.address}/v1", api_key="none", model="sport", max_tokens=5, n=1, best_of=1
    )
    assert isinstance(model.invoke("x"), str)
