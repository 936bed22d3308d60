"""API keys: a file names them and holds their hashes; every route but OPEN_PATHS answers 401 without one of them.

    alice = { sha256 = "…64 hex digits…" }                               one line a key, TOML; or the same text in RM_ROBUST_API_KEYS
    bob = { sha256 = "…", requests_per_minute = 600 }

    python -m serve.keys alice                                           prints a fresh key, once, and its line

Keys have 256 random bits, so a plain hash gives nothing away. A key is taken back by deleting its line and deploying again. The pipeline
makes a key of its own for each run (rm_robust/stages.py), so its scorers are guarded as well. Without keys (`insecure_no_auth`) only clients
on the same machine are answered.

Ray Serve's proxy stands before all this and answers two paths of its own to anybody: /-/healthz, and /-/routes (route prefixes and application
names). Let the TLS proxy in front of an open port refuse /-/.
"""

import argparse
import hashlib
import hmac
import ipaddress
import math
import os
import re
import secrets
import sys
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rm_robust.errors import ConfigError
from rm_robust.score_contract import ErrorDetail, ErrorReply
from serve.pages import PAGES, page_response
from serve.request_id import ERROR_HEADER

KEYS_VARIABLE = "RM_ROBUST_API_KEYS"
OPEN_PATHS = ("/healthz", "/readyz")
"""What load balancers ask, without a key."""
NAME_PATTERN = r"^[A-Za-z0-9_-]+$"
WINDOW_S = 60.0


class ApiKey(BaseModel):
    """One key that is accepted. Only its hash is known here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key's bytes, in hex."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """None: as many as the scorer's queue takes."""


class RateLimit:
    """At most `requests_per_minute` requests within any 60 seconds."""

    def __init__(self, requests_per_minute: int) -> None:
        self._admitted_s: deque[float] = deque(maxlen=requests_per_minute)

    def allows_as_much_as(self, other: "RateLimit") -> bool:
        return self._admitted_s.maxlen == other._admitted_s.maxlen

    def wait_s(self, now_s: float) -> float:
        """0.0 when the request of now is admitted, and counted; otherwise the seconds until one would be."""
        full = len(self._admitted_s) == self._admitted_s.maxlen
        if full and now_s - self._admitted_s[0] < WINDOW_S:
            return self._admitted_s[0] + WINDOW_S - now_s
        self._admitted_s.append(now_s)
        return 0.0


class Guard:
    """Who may pass: the holders of `keys`, or, with none, whoever is on this machine."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._limits: dict[str, RateLimit] = {}
        self.replace_keys(keys)

    def replace_keys(self, keys: Sequence[ApiKey]) -> None:
        """Accept these keys, and no others, from the next request on. A limit that stays remembers what it has admitted."""
        limits = {key.name: RateLimit(key.requests_per_minute) for key in keys if key.requests_per_minute is not None}
        self._limits = {name: self._limits[name] if name in self._limits and self._limits[name].allows_as_much_as(new) else new for name, new in limits.items()}
        self._keys = keys

    def refusal(self, scope: Scope, now_s: float) -> Response | None:
        """The reply for an HTTP request that may not pass, None for one that may."""
        if not self._keys:
            return None if is_on_this_machine(scope) else unauthorised("This scorer was started without keys, so it answers its own machine only.")
        key = matching_key([value for name, value in scope["headers"] if name == b"authorization"], self._keys)
        if key is None:
            return unauthorised("A valid key is needed: send it as `Authorization: Bearer KEY`.")
        wait_s = self._limits[key.name].wait_s(now_s) if key.name in self._limits else 0.0
        if wait_s:
            message = f"The key {key.name!r} may send {key.requests_per_minute} requests a minute; try again after Retry-After seconds."
            return error_reply(429, "rate_limited", message, {"Retry-After": str(math.ceil(wait_s))})
        return None


class RequireKey:
    """ASGI middleware in front of every route, unknown ones too. A browser without a key gets the page, which asks for one, with status 401."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope["root_path"]) if scope["type"] == "http" else None
        if path is not None and path not in OPEN_PATHS:
            refusal = self._guard.refusal(scope, time.monotonic())
            if refusal is not None:
                if refusal.status_code == 401 and scope["method"] == "GET" and path in PAGES:
                    refusal = page_response(PAGES[path], status=401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def matching_key(authorization: Sequence[bytes], keys: Sequence[ApiKey]) -> ApiKey | None:
    """The key that the one Authorization header carries. Each key is compared, in constant time, whichever matches."""
    scheme, _, credentials = authorization[0].partition(b" ") if len(authorization) == 1 else (b"", b"", b"")
    digest = hashlib.sha256(credentials.strip()).hexdigest()
    matches = [hmac.compare_digest(digest, key.sha256) for key in keys]
    return keys[matches.index(True)] if scheme.lower() == b"bearer" and any(matches) else None


def is_on_this_machine(scope: Scope) -> bool:
    """The client's address may be what a proxy on this machine says of it (X-Forwarded-For), and that need not be an address."""
    try:
        return scope["client"] is not None and ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False


def unauthorised(message: str) -> Response:
    return error_reply(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def error_reply(status: int, error_type: str, message: str, headers: dict[str, str]) -> Response:
    body = ErrorReply(error=ErrorDetail(type=error_type, message=message))
    return Response(body.model_dump_json(), status_code=status, headers={ERROR_HEADER: error_type, **headers}, media_type="application/json")


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys file. Raises ConfigError when there is none, and as parse_keys."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The keys file {path} cannot be read: {error}.") from error
    return parse_keys(text, source=str(path))


def keys_from_environment() -> tuple[ApiKey, ...]:
    """The keys in RM_ROBUST_API_KEYS; none where it is not set. Raises ConfigError as parse_keys."""
    return parse_keys(os.environ[KEYS_VARIABLE], source=KEYS_VARIABLE) if KEYS_VARIABLE in os.environ else ()


def parse_keys(text: str, *, source: str) -> tuple[ApiKey, ...]:
    """Raises ConfigError for text that is not TOML, for a wrong field, for one key under two names, and for no keys at all.

    No message, and no chained error, repeats a value: somebody may have written the key in place of its hash.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}.") from None
    keys = tuple(parse_key(name, entry, source=source) for name, entry in table.items())
    if not keys:
        raise ConfigError(f"{source} holds no keys; `python -m serve.keys NAME` makes one.")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ConfigError(f"{source} holds one key under two names; deleting one of them would not take it back. Give each name a key of its own.")
    return keys


def parse_key(name: str, entry: object, *, source: str) -> ApiKey:
    if not isinstance(entry, dict):
        raise ConfigError(f'{source}: {name} must be a table: {name} = {{ sha256 = "…" }}.')
    try:
        return ApiKey.model_validate({**entry, "name": name})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{source}: {name}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from None


def new_key(name: str) -> tuple[str, ApiKey]:
    """A fresh random key, and the entry under which a server accepts it."""
    key = "rmk_" + secrets.token_urlsafe(32)
    return key, ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="Make an API key: printed once, here; only its hash is kept.")
    parser.add_argument("name", help="whose key it is: letters, digits, _ and -")
    name = parser.parse_args(arguments).name
    if not re.fullmatch(NAME_PATTERN, name):
        parser.error(f"a name has letters, digits, _ and - only, got {name!r}")
    key, entry = new_key(name)
    print(f'The key, for its owner; it is not shown again:\n\n  {key}\n\nIts line for the keys file:\n\n  {name} = {{ sha256 = "{entry.sha256}" }}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
