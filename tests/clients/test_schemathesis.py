"""Random requests after the server's own schema: no 5xx, and every refusal has the shape that clients read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from served import Served

schemathesis = pytest.importorskip("schemathesis")

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/tables", "/v1/models", "/v1/models/{model_id}", "/health"]
PATHS += ["/v1/load_prefix", "/v1/unload_prefix"]


@pytest.mark.parametrize("path", PATHS)
def test_no_request_breaks_the_server(served: Served, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{served.address}/openapi.json")
    method = "GET" if "models" in path or path == "/health" else "POST"
    operation = schema[path][method]

    def holds(case: Any) -> None:
        if isinstance(case.body, dict) and path.endswith("load_prefix"):
            case.body["prefix_name"] = "menus" if len(str(case.body)) % 2 else case.body.get("prefix_name", "x")
        elif isinstance(case.body, dict):
            if "n" in case.body:  # what it asks for is done, so it asks for little
                case.body["n"] = 1
            case.body["max_tokens"] = 2
            case.body["model"] = "menus" if len(str(case.body)) % 2 else case.body.get("model", "x")
        reply = case.call(timeout=60)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400 and path != "/health":
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    strategy = operation.as_strategy()
    from hypothesis import given

    settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(
        given(strategy)(holds)
    )()
    with served.client() as client:
        assert client.get("/health").json()["status"] == "ok"
