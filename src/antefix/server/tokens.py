"""The base's tokenizer as the server needs it: texts and conversations to ids, ids to texts, tokens to bytes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from antefix.errors import one_line
from antefix.server.refusal import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG = 10_000
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokens:
    """A tokenizer, and how many tokens its model has positions for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int | None, num_ids: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.num_ids = num_ids
        """Token ids that the model knows."""
        self._bytes: dict[int, bytes] = {}
        self._one_at_a_time = asyncio.Lock()
        special = set(tokenizer.all_special_ids)
        self._literal = special | set(tokenizer.added_tokens_decoder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._of_bytes = "ByteLevel" in str(getattr(backend, "decoder", ""))

    async def of_text(self, text: str) -> tuple[int, ...]:
        """The ids of a text, with the token that every text starts with, where the tokenizer has one."""
        if len(text) < _LONG:
            return self._encode(text)
        async with self._one_at_a_time:  # a long one would keep all others waiting
            return await asyncio.to_thread(self._encode, text)

    async def of_chat(self, turns: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The ids of a conversation in the tokenizer's chat template; an assistant's turn at its end is gone on with.

        Raises Refusal where there is no template, or it refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise Refusal(
                400, "the base's tokenizer has no chat template: use /v1/completions", code="no_chat_template"
            )
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._templated, turns)

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def bytes_of(self, token_id: int) -> bytes:
        """What a token writes; a character's bytes may be spread over tokens."""
        if (known := self._bytes.get(token_id)) is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # an id of the embedding that the tokenizer has no token for
            return b""
        if token_id in self._literal:
            return token.encode()
        if self._of_bytes:
            return bytes(_BYTE_OF[c] for c in token if c in _BYTE_OF)
        if match := _ONE_BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def name_of(self, token_id: int) -> str:
        """A token as text; one that is no whole character as `bytes:\\xe2\\x80`, as OpenAI writes it."""
        found = self.bytes_of(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def refuse_unknown(self, ids: Sequence[int], param: str) -> None:
        """Raises Refusal for an id that the model does not have."""
        if ids and max(ids) >= self.num_ids:
            raise Refusal(
                400, f"token id {max(ids)} is none of the base's, which are 0 to {self.num_ids - 1}", param=param
            )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text)["input_ids"])

    def _templated(self, turns: Sequence[dict[str, str]]) -> tuple[int, ...]:
        goes_on = turns[-1]["role"] == "assistant"
        how: dict[str, Any] = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        try:
            return tuple(self.tokenizer.apply_chat_template(list(turns), return_dict=False, **how))
        except (TemplateError, ValueError) as error:
            raise Refusal(
                400, f"the base's chat template refuses this conversation ({one_line(error)})", param="messages"
            ) from error


def _byte_of() -> dict[str, int]:
    """The character that byte-level tokenizers write for a byte: itself where it is printable, else one beyond 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_of()
