"""A model behind an OpenAI-compatible server, named `MODEL@URL` as in `qwen3@http://127.0.0.1:8000/v1`.

Nothing but the address that the user typed is asked: no redirects are followed, and the key, from OPENAI_API_KEY,
goes there alone.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from tunesmith.compare.store import Messages
from tunesmith.core.errors import ResourceError
from tunesmith.core.files import strict_loads

ANSWER_BYTES = 10_000_000
SECONDS = 300
TRIES = 4


class Endpoint:
    """A model that is asked over HTTP.

    Args:
        name: `MODEL@URL`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, _, base = name.partition("@")
        self.url = f"{base.rstrip('/')}/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)

    @staticmethod
    def is_one(source: str) -> bool:
        """Whether a name means an endpoint."""
        model, _, base = source.partition("@")
        return bool(model) and base.startswith(("http://", "https://"))

    def answer(
        self, conversations: Sequence[Messages], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str]:
        """An answer to each conversation. Raises ResourceError where the server does not give one."""
        found = []
        for messages, seed in zip(conversations, seeds, strict=True):
            asked = {
                "model": self.model,
                "messages": [
                    {"role": one["role"], "content": "\n\n".join(filter(None, (one["content"], one.get("context"))))}
                    for one in messages
                ],
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed % 2**31,
            }
            found.append(self._text(self._post(asked)))
        return found

    def _post(self, asked: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), headers)
        for attempt in range(TRIES):
            try:
                with self._opener.open(request, timeout=SECONDS) as reply:
                    return strict_loads(reply.read(ANSWER_BYTES).decode("utf-8"))
            except urllib.error.HTTPError as error:
                told = f"answered {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    raise ResourceError(
                        told, where=self.name, hint="check the model's name and OPENAI_API_KEY"
                    ) from error
            except (urllib.error.URLError, OSError) as error:
                told = f"cannot be reached: {getattr(error, 'reason', error)}"
            except ValueError as error:
                raise ResourceError(f"did not answer JSON: {error}", where=self.name) from error
            if attempt + 1 < TRIES:
                time.sleep(2.0**attempt)
        raise ResourceError(f"{told}, {TRIES} times", where=self.name, hint="the same command goes on where it was")

    def _text(self, reply: Any) -> str:
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ResourceError("answered something else than a chat completion", where=self.name) from error
        return content if isinstance(content, str) else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow to where a server points."""

    def redirect_request(self, *_: Any) -> None:
        return None
