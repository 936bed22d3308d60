"""Every reply has an id, the caller's own or a new one, and a refusal its reason, in headers that all dialects share."""

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
ERROR_HEADER = "x-rm-robust-error"
"""The `type` of a failure, which some dialects' bodies have no room for."""
VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class AddRequestId:
    """ASGI middleware. An id that could not stand in a log line is replaced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER.encode()), b"")
        request_id = given if VALID_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)
