"""HTTP for load tests: each request has a connection of its own.

The client does so little work that many requests really arrive at the same time.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rm_robust.scoring.contract import SCORE_PATH, ScoreInput

REPLY_WITHIN_S = 90.0


@dataclass(frozen=True)
class Reply:
    """A reply of the service. The names of `headers` are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def scores(self) -> list[list[float]]:
        return [result["scores"] for result in self.json["results"]]


def score_body(*inputs: ScoreInput, **fields: object) -> bytes:
    return json.dumps({"inputs": [item.model_dump() for item in inputs], **fields}).encode()


async def post(base_url: str, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    """Post `body` to SCORE_PATH, and return the reply. Cancelling the call closes the connection.

    Raises OSError or ValueError if there is no complete reply, and TimeoutError if it is late.
    """
    host, _, port = urlsplit(base_url).netloc.partition(":")
    lines = {
        "host": host,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(headers or {}),
    }
    head = "".join(
        [f"POST {SCORE_PATH} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in lines.items()), "\r\n"]
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(REPLY_WITHIN_S):
            writer.write(head.encode() + body)
            answer = await reader.read()
    finally:
        writer.transport.abort()
    top, _, content = answer.partition(b"\r\n\r\n")
    status_line, *header_lines = top.decode().split("\r\n")
    replied = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines)}
    if len(content) != int(replied.get("content-length", "-1")):
        raise ValueError(f"incomplete reply: {answer[:200]!r}")
    return Reply(int(status_line.split()[1]), replied, content)


async def post_all(base_url: str, bodies: list[bytes], headers: Mapping[str, str] | None = None) -> list[Reply]:
    """Post all bodies at the same time, and return their replies."""
    return await asyncio.gather(*(post(base_url, body, headers) for body in bodies))


def metric(base_url: str, name: str, headers: Mapping[str, str] | None = None) -> float:
    """Return the sum over all labels of one sample of /metrics, or 0.0 if there is no such sample yet."""
    lines = (
        httpx.get(f"{base_url}/metrics", headers=dict(headers or {}), timeout=30, trust_env=False)
        .raise_for_status()
        .text.splitlines()
    )
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
