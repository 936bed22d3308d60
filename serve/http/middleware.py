"""What stands between a client and a route: reading the whole body, request ids, keys and rate limits.

A refusal reaches its client even when the client is still sending: the rest of the body is read and thrown away before
the reply. Otherwise the reply could be lost: a server that closes a connection with unread bytes resets it. That
happens to large bodies that are refused for their size, or for a wrong key, from clients that ask for
`Connection: close`. By default, nginx asks its upstreams for that.

Every reply carries an id, the caller's own or a new one, and every refusal carries its reason, in headers that all
dialects share.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rm_robust.scoring.contract import ERROR_HEADER, ErrorDetail, ErrorReply
from serve.http.pages import PAGES, page_response
from serve.keys import ApiKey

DISCARD_AT_MOST_BYTES = 64 << 20
"""The most bytes of a refused body that are read and thrown away."""
DISCARD_WITHIN_S = 10.0
"""Seconds for which a refused body is read and thrown away."""
REQUEST_ID_HEADER = "x-request-id"
VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = ("/healthz", "/readyz")
"""The paths that need no key, for load balancers."""
WINDOW_S = 60.0
"""Seconds over which a key's rate limit counts requests."""


class ReadWholeBody:
    """ASGI middleware that reads the rest of a body before it sends the reply.

    It reads no more than DISCARD_AT_MOST_BYTES, and for no longer than DISCARD_WITHIN_S; beyond that, the client may
    see a reset.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_read, num_received = False, 0
        waits_for_continue = any(name == b"expect" for name, _ in scope["headers"])

        async def counted() -> Message:
            nonlocal is_read, num_received
            message = await receive()
            is_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
            num_received += len(message.get("body", b""))
            return message

        async def send_when_read(message: Message) -> None:
            # A client that waits for "100 Continue" sends nothing after a refusal.
            will_send = num_received > 0 or not waits_for_continue
            if message["type"] == "http.response.start" and not is_read and will_send:
                try:
                    async with asyncio.timeout(DISCARD_WITHIN_S):
                        while not is_read and num_received < DISCARD_AT_MOST_BYTES:
                            await counted()
                except TimeoutError:
                    pass
            await send(message)

        await self._app(scope, counted, send_when_read)


class AddRequestId:
    """ASGI middleware that gives every reply a request id. A caller's id that is not fit for a log line is replaced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        callers_id = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER.encode()), b"")
        request_id = callers_id if VALID_ID.fullmatch(callers_id) else uuid.uuid4().hex.encode()
        scope["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class RateLimit:
    """Admits at most `requests_per_minute` requests within any 60 seconds."""

    def __init__(self, requests_per_minute: int) -> None:
        self._admitted_s: deque[float] = deque(maxlen=requests_per_minute)

    def allows_as_much_as(self, other: "RateLimit") -> bool:
        return self._admitted_s.maxlen == other._admitted_s.maxlen

    def wait_s(self, now_s: float) -> float:
        """Admit and count a request at this time and return 0.0, or return the seconds until one is admitted."""
        full = len(self._admitted_s) == self._admitted_s.maxlen
        if full and now_s - self._admitted_s[0] < WINDOW_S:
            return self._admitted_s[0] + WINDOW_S - now_s
        self._admitted_s.append(now_s)
        return 0.0


class Guard:
    """Decides who may pass: the holders of `keys`, or, if there are no keys, all clients on this machine."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._limits: dict[str, RateLimit] = {}
        self.replace_keys(keys)

    def replace_keys(self, keys: Sequence[ApiKey]) -> None:
        """Accept these keys, and no others, from the next request on.

        A rate limit that stays the same remembers the requests that it has admitted.
        """
        limits = {key.name: RateLimit(key.requests_per_minute) for key in keys if key.requests_per_minute is not None}
        self._limits = {
            name: self._limits[name] if name in self._limits and self._limits[name].allows_as_much_as(new) else new
            for name, new in limits.items()
        }
        self._keys = keys

    def refusal(self, scope: Scope, now_s: float) -> Response | None:
        """Return the reply for an HTTP request that may not pass, None for one that may."""
        if not self._keys:
            return (
                None
                if is_on_this_machine(scope)
                else unauthorised("This scorer was started without keys, so it answers its own machine only.")
            )
        key = matching_key([value for name, value in scope["headers"] if name == b"authorization"], self._keys)
        if key is None:
            return unauthorised("A valid key is needed: send it as `Authorization: Bearer KEY`.")
        wait_s = self._limits[key.name].wait_s(now_s) if key.name in self._limits else 0.0
        if wait_s:
            message = (
                f"The key {key.name!r} may send {key.requests_per_minute} requests a minute; "
                "try again after Retry-After seconds."
            )
            return error_reply(429, "rate_limited", message, {"Retry-After": str(math.ceil(wait_s))})
        return None


class RequireKey:
    """ASGI middleware that guards every route, unknown ones too.

    A browser without a key gets the page with status 401, and the page asks for a key.
    """

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
    """Return the accepted key that the only Authorization header carries, None if there is none.

    Every key is compared, in constant time, even after a match.
    """
    scheme, _, credentials = authorization[0].partition(b" ") if len(authorization) == 1 else (b"", b"", b"")
    digest = hashlib.sha256(credentials.strip()).hexdigest()
    matches = [hmac.compare_digest(digest, key.sha256) for key in keys]
    return keys[matches.index(True)] if scheme.lower() == b"bearer" and any(matches) else None


def is_on_this_machine(scope: Scope) -> bool:
    """Return whether the client is on this machine.

    Its address may come from a proxy on this machine (X-Forwarded-For), and then it need not be an address at all.
    """
    try:
        return scope["client"] is not None and ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False


def unauthorised(message: str) -> Response:
    return error_reply(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def error_reply(status: int, error_type: str, message: str, headers: dict[str, str]) -> Response:
    body = ErrorReply(error=ErrorDetail(type=error_type, message=message))
    return Response(
        body.model_dump_json(),
        status_code=status,
        headers={ERROR_HEADER: error_type, **headers},
        media_type="application/json",
    )
