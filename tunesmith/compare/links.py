"""Links that are keys: one for each annotator, one for the statistics. Nothing opens without one.

The one idea: a link's token is made from one secret and the name that it is for, so no token is stored, and a store
that is copied opens nothing. Source: HMAC, RFC 2104, with SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from tunesmith.core.errors import ConfigError, ResourceError
from tunesmith.core.files import os_error

VARIABLE = "TUNESMITH_COMPARE_KEY"
SHORTEST = 16


class Links:
    """Tokens from a secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, role: str, name: str = "") -> str:
        """The token of a role (`a` for annotators, `s` for statistics) and a name: 43 letters that fit into a URL."""
        digest = hmac.new(self._secret, f"{role}/{name}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def fits(self, token: str, role: str, name: str = "") -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.token(role, name).encode())

    def annotator(self, base: str, name: str) -> str:
        """The link of an annotator below a page's address."""
        return f"{base}/a/{name}/{self.token('a', name)}/"

    def statistics(self, base: str) -> str:
        """The link of the statistics."""
        return f"{base}/s/{self.token('s')}/"


def own_key() -> str | None:
    """The key that the environment gives, or None. Raises ConfigError where it is too short to be one."""
    key = os.environ.get(VARIABLE)
    if key is not None and len(key) < SHORTEST:
        hint = 'export it with `export TUNESMITH_COMPARE_KEY="$(openssl rand -hex 32)"`'
        raise ConfigError(f"has {len(key)} characters; a key has at least {SHORTEST}", where=VARIABLE, hint=hint)
    return key


def open_links(folder: Path, key: str | None) -> Links:
    """Links from a key, or from a secret that the folder keeps (made at first, readable by its owner alone)."""
    if key is not None:
        return Links(key.encode())
    path = folder / "secret"
    try:
        if not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(32))
        secret = path.read_text("utf-8").strip()
    except OSError as error:
        raise os_error(path, error) from error
    if len(secret) < SHORTEST:
        raise ResourceError("is damaged", where=str(path), hint="delete it; links given out before will not open")
    return Links(secret.encode())
