"""The clients of the scoring service, without torch and Ray, for other teams too. contract.py has the contract.

with RewardClient("http://127.0.0.1:8000/proxy") as client:
    client.score([ScoreInput(prompt="Name a colour.", completions=["Blue.", "Seven."])]).scores  # [[float, float]]
"""

import asyncio
import logging
import os
import random
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self, TypedDict, TypeVar, Unpack

import httpx
from pydantic import ValidationError
from tqdm import tqdm

from rm_robust.errors import ConfigError, RefusedInputError, ScorerUnavailableError, ScoringError
from rm_robust.scoring.contract import (
    ERROR_HEADER,
    NOT_SCORABLE,
    SCORE_PATH,
    ErrorReply,
    ScoreInput,
    ScoreReply,
    ScoreResult,
    check_reply,
    merge_replies,
    request_for,
    split_inputs,
)

__all__ = ["AsyncRewardClient", "ClientOptions", "RewardClient", "ScoreInput", "ScoreReply", "ScoreResult"]
"""The names that other teams import. The other names of this file are for this project alone."""

logger = logging.getLogger(__name__)

KEY_VARIABLE = "RM_ROBUST_API_KEY"
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 10.0
MAX_RETRIES = 18
"""Retries of a request, because a service may be full or away for a minute. They wait 61 to 123 s in total, and beside
that what the server asks for (at most MAX_BACKOFF_S each)."""
MAX_RETRIES_OF_FAILURES = 8
"""Retries after 500 and 504, each of which costs the server a whole attempt. They wait 11 to 23 s in total."""
CONNECTION_ERRORS = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
"""Failures of the connection, not of the request. Scoring has no side effects, so it is safe to send the request
again."""
NO_PROXY_FOR_LOOPBACK: dict[str, httpx.AsyncBaseTransport | None] = {
    f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")
}

T = TypeVar("T")


class ClientOptions(TypedDict, total=False):
    """Keyword arguments of both clients. Defaults: DEFAULT_OPTIONS."""

    timeout_s: float  # limit of one attempt
    max_retries: int  # after connection errors, 429 and 5xx (500 and 504: at most 8); other failures are final
    max_completions_per_request: int  # longer lists are sent as several requests; one input is never split
    max_concurrent_requests: int
    api_key: str | None  # sent as a bearer token, never logged; None: the key in RM_ROBUST_API_KEY, if that is set
    expected_checkpoint: str | None  # "sha256:..." that every score must come from; None: any one in a call
    model: str | None  # one of the server's models; None: its first
    calibrated: bool  # (score - mean) / std of the checkpoint's held-out scores in place of raw scores
    show_progress: bool  # a bar on stderr, in completions


DEFAULT_OPTIONS = ClientOptions(
    timeout_s=60.0,
    max_retries=MAX_RETRIES,
    max_completions_per_request=64,
    max_concurrent_requests=8,
    api_key=None,
    expected_checkpoint=None,
    model=None,
    calibrated=False,
    show_progress=False,
)


class AsyncRewardClient:
    """A client that scores lists of any length. A call returns every score or raises ScoringError.

    Use it within one event loop, and close it.
    """

    def __init__(self, base_url: str, **options: Unpack[ClientOptions]) -> None:
        """Prepare the connections. Raises ConfigError for a URL that is not HTTP or a key that no header can carry."""
        settings = DEFAULT_OPTIONS | options
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"A scoring URL starts with http:// or https://, got {base_url!r}.")
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{base_url!r} is not a URL: {error}.") from error
        self._url = base_url.rstrip("/") + SCORE_PATH
        self._timeout_s = settings["timeout_s"]
        self._max_retries = settings["max_retries"]
        self._max_completions = settings["max_completions_per_request"]
        self._expected_checkpoint = settings["expected_checkpoint"]
        self._model = settings["model"]
        self._calibrated = settings["calibrated"]
        self._show_progress = settings["show_progress"]
        self._slots = asyncio.Semaphore(settings["max_concurrent_requests"])
        limits = httpx.Limits(max_connections=settings["max_concurrent_requests"])
        headers = {"content-type": "application/json", **key_header(settings["api_key"])}
        self._http = httpx.AsyncClient(
            timeout=self._timeout_s, limits=limits, mounts=NO_PROXY_FOR_LOOPBACK, headers=headers
        )

    async def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Return the scores of all inputs in order.

        Raises ScoringError, which names the inputs and the reason. Partial scores are never returned.
        """
        if not inputs:
            raise ScoringError("There is nothing to score: the list of inputs is empty.")
        spans = split_inputs(inputs, self._max_completions)
        num_completions = sum(len(item.completions) for item in inputs)
        with tqdm(
            desc="score", unit=" completions", total=num_completions, disable=not self._show_progress, mininterval=1
        ) as bar:
            tasks = [asyncio.create_task(self._score_span(inputs, span, bar)) for span in spans]
            try:
                replies = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return merge_replies(replies, spans, expected_checkpoint=self._expected_checkpoint)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _score_span(self, inputs: Sequence[ScoreInput], span: range, bar: "tqdm[NoReturn]") -> ScoreReply:
        part = [inputs[i] for i in span]
        request = request_for(part, model=self._model, calibrated=self._calibrated)
        async with self._slots:
            try:
                reply = check_reply(await self._post(request.model_dump_json(exclude_unset=True)), request)
                bar.update(sum(len(item.completions) for item in part))
                return reply
            except ScoringError as error:
                note = f" (an index in this message counts from input {span.start})" if span.start else ""
                raise type(error)(
                    f"Scoring inputs {span.start} to {span.stop - 1} of {len(inputs)} at {self._url} failed: "
                    f"{error}{note}"
                ) from error

    async def _post(self, body: str) -> bytes:
        """Return the body of a 200 reply. Raises ScoringError with the reason of the last attempt."""
        retries = Retries(self._max_retries)
        while True:
            try:
                response = await self._http.post(self._url, content=body)
            except CONNECTION_ERRORS as error:
                failure = Failure(503, f"{type(error).__name__} {error}".strip())
            except httpx.TimeoutException as error:
                raise ScorerUnavailableError(
                    f"{type(error).__name__} {error} (a timeout is {self._timeout_s} s)"
                ) from error
            except httpx.HTTPError as error:
                raise ScoringError(f"{type(error).__name__} {error}") from error
            else:
                if response.status_code == 200:
                    return response.content
                retry_after_s = (
                    float(seconds) if (seconds := response.headers.get("retry-after", "")).isdecimal() else 0.0
                )
                failure = Failure(
                    response.status_code,
                    describe_failure(response),
                    response.headers.get(ERROR_HEADER, ""),
                    retry_after_s,
                )
            await asyncio.sleep(retries.next_wait_s(failure))


class RewardClient:
    """AsyncRewardClient for synchronous code, on an event loop of its own.

    Threads may share it. Close it, or use `with`.
    """

    def __init__(self, base_url: str, **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncRewardClient(base_url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="RewardClient", daemon=True)
        self._thread.start()

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Return the scores of all inputs in order, as AsyncRewardClient.score does."""
        return self._run(self._client.score(inputs))

    def close(self) -> None:
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[None, None, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


def key_header(api_key: str | None) -> dict[str, str]:
    """Return the Authorization header for the key, or for the key in the environment. It is empty without a key."""
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable() and key) or " " in key:
        raise ConfigError(
            f"The API key (api_key, or {KEY_VARIABLE}) must be printable ASCII without spaces; "
            f"it has {len(key)} characters."
        )
    return {"authorization": f"Bearer {key}"}


def backoff_s(attempt: int, *, retry_after_s: float) -> float:
    """Return the seconds to wait after failed attempt number `attempt` (from 0).

    They double with jitter, up to MAX_BACKOFF_S, and are added to what the server asks for, up to MAX_BACKOFF_S.
    """
    doubling_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0**attempt)
    return min(MAX_BACKOFF_S, retry_after_s) + doubling_s * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Failure:
    """Why an attempt got no scores."""

    status: int
    """The HTTP status: 503 when nobody was there to answer, 504 when nobody answered in time."""
    reason: str
    type: str = ""
    """The error's type, if the service is one of ours."""
    retry_after_s: float = 0.0


class Retries:
    """The count of one request's attempts, for a client over HTTP or inside a cluster."""

    def __init__(self, max_retries: int) -> None:
        self._num_left, self._num_failures_left = max_retries, MAX_RETRIES_OF_FAILURES
        self._num_attempts = 0

    def next_wait_s(self, failure: Failure) -> float:
        """Return the seconds until the next attempt.

        Raises RefusedInputError when a text is the reason, ScoringError when another attempt would not help, and
        ScorerUnavailableError when the attempts are used up.
        """
        self._num_attempts += 1
        if failure.type == NOT_SCORABLE or failure.status in (413, 422):
            raise RefusedInputError(failure.reason)
        if failure.status != 429 and failure.status < 500:
            raise ScoringError(failure.reason)
        self._num_left -= 1
        self._num_failures_left -= failure.status in (500, 504)
        num_left = min(self._num_left, self._num_failures_left)
        if num_left < 0:
            error_class = ScoringError if failure.status == 500 else ScorerUnavailableError
            raise error_class(f"{self._num_attempts} attempts, the last one: {failure.reason}")
        logger.info("scoring attempt %d failed, %d are left: %s", self._num_attempts, num_left + 1, failure.reason)
        return backoff_s(self._num_attempts - 1, retry_after_s=failure.retry_after_s)


def describe_failure(response: httpx.Response) -> str:
    """Return the status and the server's message, or the start of a body that is not ours (a proxy's page)."""
    try:
        said = ErrorReply.model_validate_json(response.content).error.message
    except ValidationError:
        said = response.text[:200]
    had_key = "authorization" in response.request.headers
    fix = f". Set {KEY_VARIABLE} to a key of the service" if response.status_code == 401 and not had_key else ""
    return f"HTTP {response.status_code}: {said.rstrip('.') if fix else said}{fix}"
