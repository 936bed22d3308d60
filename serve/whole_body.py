"""A refusal reaches its client even when that is still sending: the rest of the body is read, and thrown away, before the reply.

A server that closes a connection with unread bytes resets it, and the reply is lost with it. That happens to large bodies that are refused for
their size, or for a wrong key, from clients that ask for `Connection: close`, as nginx does of its upstreams unless told otherwise.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCARD_AT_MOST_BYTES = 64 << 20
DISCARD_WITHIN_S = 10.0


class ReadWholeBody:
    """ASGI middleware. Within its two limits; beyond them the client may see a reset."""

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
            will_send = num_received > 0 or not waits_for_continue  # a client that waits for 100 sends nothing after a refusal
            if message["type"] == "http.response.start" and not is_read and will_send:
                try:
                    async with asyncio.timeout(DISCARD_WITHIN_S):
                        while not is_read and num_received < DISCARD_AT_MOST_BYTES:
                            await counted()
                except TimeoutError:
                    pass
            await send(message)

        await self._app(scope, counted, send_when_read)
