"""What a request can be told instead of an answer: one shape, `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Send

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class Refusal(Exception):  # noqa: N818 - a reply, not a fault
    """A request is not answered, and why. retry_after: in so many seconds it may be."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def content(self) -> dict[str, Any]:
        """The body of the reply, or the event of a stream that fails."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Of the reply."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    async def reply(self, send: Send, *more: tuple[bytes, bytes]) -> None:
        """Send it, with more headers, where no framework does."""
        body = json.dumps(self.content()).encode()
        own = [(name.lower().encode(), value.encode()) for name, value in self.headers().items()]
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *own, *more
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
