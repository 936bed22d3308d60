"""The routes: they read bodies within their limits, pass requests to the front, and give failures one JSON shape.

Every path but the last two: 401 without a key · 429 beyond the key's own limit (keys.py)
POST /v1/score   200 scores · 404 unknown model · 413 too long, too many, too large · 422 wrong body
                 429 queue full (Retry-After) · 500 scoring failed · 504 no scores in time
POST /get_reward, /classify, /pooling, /predict, /rerank
                 the same scores and statuses, in other servers' JSON (dialects.py)
GET  /v1/models  200 what is served · 503 no replica answers
GET  /metrics    200 Prometheus' text format
GET  /, /docs    200 pages for people; both work without internet
GET  /openapi.json
GET  /readyz     200: every model has a replica that answers, and room · 503
GET  /healthz    200: this process answers
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from rm_robust.scoring.contract import (
    ERROR_HEADER,
    SCORE_PATH,
    Calibration,
    ErrorDetail,
    ErrorReply,
    ScoreReply,
    ScoreRequest,
)
from serve.batching.front import NO_ANSWER, Front
from serve.http.dialect_replies import (
    ClassifyReply,
    OpenRlhfReply,
    PoolingReply,
    TeiErrorReply,
    TeiPredictReply,
    TeiRank,
    VllmErrorReply,
)
from serve.http.dialects import ClassifyBody, DialectBody, OpenRlhfBody, PoolingBody, TeiPredictBody, TeiRerankBody
from serve.http.middleware import AddRequestId, Guard, RequireKey, error_reply
from serve.http.openapi import (
    SCORING_FAILURES,
    Alive,
    ModelEntry,
    ModelList,
    Ready,
    body_in_openapi,
    failures,
)
from serve.http.pages import PAGES, page_response
from serve.metrics import CountRequests
from serve.work import DialectRequest, Outcome, Refusal, Scored, ScoringRequest

logger = logging.getLogger(__name__)
router = APIRouter()
Shape = Callable[[Refusal], Mapping[str, Any]]

CLIENT_WENT_AWAY = 499
"""nginx's status for a client that closed the connection; nobody reads this reply."""
MANY_PROBLEMS = 1000
"""The most problems of one body that are described; describing more costs more than it tells."""
LONGEST_FIELD = 60
"""Characters of a field's name that a message repeats, because the name of an unknown field is the caller's text."""


def scoring_api(front: Front, guard: Guard) -> ASGIApp:
    """Return the whole HTTP side of one front, as an ASGI application."""
    # FastAPI's own pages load scripts from the internet, so they are off. Its redirects to a path with or without a
    # slash are off too: a client would send the body again to an address made of its Host header, and with http://
    # behind a proxy that speaks https.
    api = FastAPI(title="rm_robust scoring", docs_url=None, redoc_url=None, redirect_slashes=False)
    api.state.front = front
    api.include_router(router)
    api.add_exception_handler(HTTPException, unknown_route)
    api.add_exception_handler(ClientDisconnect, client_went_away)
    api.add_exception_handler(Exception, internal_error)
    routes = frozenset(route.path for route in api.routes if hasattr(route, "path"))
    guarded = RequireKey(api, guard)
    return AddRequestId(CountRequests(guarded, front.metrics, routes))


@router.post(
    SCORE_PATH,
    summary="Score completions",
    response_model=ScoreReply,
    responses=failures(*SCORING_FAILURES, 404),
    openapi_extra=body_in_openapi(ScoreRequest),
)
async def score(request: Request) -> Response:
    """Return raw scores of completions, in the order of the request."""
    # The body is parsed here, not by FastAPI, so that there is one parser and one error shape. The parser also refuses
    # what is not UTF-8 or nests without end.
    content = await body_within_limit(request)
    if isinstance(content, Refusal):
        return refusal_response(content)
    try:
        body = ScoreRequest.model_validate_json(content)
    except ValidationError as error:
        return refusal_response(Refusal(422, "invalid_request", describe_invalid_body(error)))
    outcome = await outcome_for_client(request, body, body.model)
    if isinstance(outcome, Refusal):
        return refusal_response(outcome)
    return Response(score_reply(body, outcome).model_dump_json(exclude_unset=True), media_type="application/json")


def score_reply(request: ScoreRequest, scored: Scored) -> ScoreReply:
    """Return the native reply. Its JSON leaves out fields that were not asked for."""
    served = scored.served
    reply = ScoreReply(
        model=served.model, checkpoint=served.checkpoint, template=served.template, results=scored.results
    )
    if request.calibrated and served.calibration is not None:
        mean, std = served.calibration
        reply.calibration = Calibration(mean=mean, std=std)
    return reply


@router.post(
    "/get_reward",
    summary="Score rendered conversations (OpenRLHF)",
    response_model=OpenRlhfReply,
    responses=failures(*SCORING_FAILURES),
    openapi_extra=body_in_openapi(OpenRlhfBody),
)
async def open_rlhf(request: Request) -> Response:
    """Return raw scores of rendered conversations, as OpenRLHF's serve_rm does."""
    return await answer_dialect(request, OpenRlhfBody)


@router.post(
    "/classify",
    summary="Score rendered conversations or messages (vLLM)",
    response_model=ClassifyReply,
    responses=failures(*SCORING_FAILURES, 404, shape=VllmErrorReply),
    openapi_extra=body_in_openapi(ClassifyBody),
)
async def vllm_classify(request: Request) -> Response:
    """Answer as vLLM's /classify does. Scores are raw unless use_activation is true."""
    return await answer_dialect(request, ClassifyBody)


@router.post(
    "/pooling",
    summary="Score rendered conversations or messages (vLLM)",
    response_model=PoolingReply,
    responses=failures(*SCORING_FAILURES, 404, shape=VllmErrorReply),
    openapi_extra=body_in_openapi(PoolingBody),
)
async def vllm_pooling(request: Request) -> Response:
    """Answer as vLLM's /pooling does. Scores are raw unless use_activation is true."""
    return await answer_dialect(request, PoolingBody)


@router.post(
    "/predict",
    summary="Score rendered conversations or pairs (text-embeddings-inference)",
    response_model=TeiPredictReply,
    responses=failures(*SCORING_FAILURES, shape=TeiErrorReply),
    openapi_extra=body_in_openapi(TeiPredictBody),
)
async def tei_predict(request: Request) -> Response:
    """Answer as text-embeddings-inference's /predict does. A pair is a prompt and a completion."""
    return await answer_dialect(request, TeiPredictBody)


@router.post(
    "/rerank",
    summary="Order a prompt's completions by their scores (text-embeddings-inference)",
    response_model=list[TeiRank],
    responses=failures(*SCORING_FAILURES, shape=TeiErrorReply),
    openapi_extra=body_in_openapi(TeiRerankBody),
)
async def tei_rerank(request: Request) -> Response:
    """Answer as text-embeddings-inference's /rerank does. The texts are completions of the query."""
    return await answer_dialect(request, TeiRerankBody)


@router.get("/v1/models", summary="List the models", response_model=ModelList, responses=failures(401, 429, 503))
async def models(request: Request) -> Response:
    """Return what is served: names, checkpoints, and how long a conversation may be."""
    try:
        served_models = await front_of(request).models()
    except NO_ANSWER as error:
        logger.warning("no replica: %s", error)
        return error_reply(503, "unavailable", "A model has no replica that can answer now; try again.", {})
    entries = [
        ModelEntry(
            id=served.model,
            checkpoint=served.checkpoint,
            template=served.template,
            max_length_tokens=served.max_length_tokens,
            calibration=None
            if served.calibration is None
            else Calibration(mean=served.calibration[0], std=served.calibration[1]),
            reload_error=served.reload_error,
        )
        for served in served_models
    ]
    return Response(ModelList(data=entries).model_dump_json(), media_type="application/json")


@router.get(
    "/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse, responses=failures(401, 429)
)
async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' text format.

    They are requests, refusals by reason, latency quantiles, queue, batches, tokens, mean and std of the scores.
    """
    return front_of(request).metrics.text()


@router.get("/readyz", summary="Ready to score?", response_model=Ready, responses=failures(503))
async def readyz(request: Request) -> Response:
    """Answer 200 when every model has a replica that answers, and room in its queue."""
    why_not = await front_of(request).why_not_ready()
    if why_not is not None:
        return error_reply(503, "not_ready", why_not, {})
    return Response(Ready().model_dump_json(), media_type="application/json")


@router.get("/healthz", summary="Alive?")
async def healthz() -> Alive:
    """Answer 200 as long as this process answers at all."""
    return Alive()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return page_response(PAGES["/"], status=200)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    return page_response(PAGES["/docs"], status=200)


async def unknown_route(request: Request, error: Exception) -> Response:
    """Answer 404 or 405 for a path below the route prefix.

    The bare prefix is the page's address without its slash, so it is redirected there.
    """
    assert isinstance(error, HTTPException)
    if request.method == "GET" and request.scope["root_path"] and request.scope["path"] == request.scope["root_path"]:
        return RedirectResponse(request.scope["root_path"] + "/")
    return error_reply(
        error.status_code,
        HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"),
        str(error.detail),
        dict(error.headers or {}),
    )


async def client_went_away(request: Request, _: Exception) -> Response:
    front_of(request).metrics.cancelled.inc()
    return error_reply(CLIENT_WENT_AWAY, "client_went_away", "The client closed the connection before the reply.", {})


async def internal_error(request: Request, error: Exception) -> Response:
    """Answer 500 for an error that nobody foresaw. The traceback is in the log, with the request's id."""
    logger.error("request %s failed", request.scope.get("request_id"), exc_info=error)
    return error_reply(
        500, "internal_error", "The server failed; the reason is in its log, under this request's id.", {}
    )


def front_of(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


async def body_within_limit(request: Request) -> bytes | Refusal:
    """Return the whole body, or a refusal with 413 as soon as it is known to be too large."""
    limit = front_of(request).settings.limits.max_body_bytes
    too_large = Refusal(
        413, "body_too_large", f"The body is larger than max_body_bytes = {limit}; send fewer inputs at a time."
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 20 or int(declared) > limit):  # int itself refuses thousands of digits
        return too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            return too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def outcome_for_client(request: Request, body: ScoringRequest, model_name: str | None) -> Outcome:
    """Return the front's outcome while the client waits for it.

    Raises ClientDisconnect when the client no longer waits; the request has then left the queue.
    """
    scoring = asyncio.ensure_future(front_of(request).score(body, model_name))
    # After the body, the next message says that the client went away.
    disconnecting = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((scoring, disconnecting), return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise ClientDisconnect
        return scoring.result()
    finally:
        disconnecting.cancel()
        scoring.cancel()


def native_error(refusal: Refusal) -> dict[str, Any]:
    return ErrorReply(error=ErrorDetail(type=refusal.type, message=refusal.message)).model_dump()


def refusal_response(refusal: Refusal, shape: Shape = native_error) -> Response:
    headers = {ERROR_HEADER: refusal.type}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(refusal.retry_after_s))
    return JSONResponse(shape(refusal), status_code=refusal.status, headers=headers)


def describe_invalid_body(error: ValidationError) -> str:
    """Return the first three problems as `inputs[0].completions: …`.

    Nothing of the body's own text is repeated, except the start of an unknown field's name.
    """
    if error.error_count() > MANY_PROBLEMS:
        return f"body: {error.error_count()} fields are wrong or unknown; GET /openapi.json says which there are."
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for problem in problems[:3]:
        field = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part:.{LONGEST_FIELD}}" for part in problem["loc"]
        ).lstrip(".")
        lines.append(f"{field or 'body'}: {problem['msg']}")
    if len(problems) > 3:
        lines.append(f"and {len(problems) - 3} more problems")
    return "; ".join(lines)


async def answer_dialect(
    request: Request, dialect: type[OpenRlhfBody | ClassifyBody | PoolingBody | TeiPredictBody | TeiRerankBody]
) -> Response:
    """Score one request of a dialect as every other, and return its reply or failure in that dialect's JSON."""
    content = await body_within_limit(request)
    if isinstance(content, Refusal):
        return refusal_response(content, dialect.error)
    try:
        body: DialectBody = dialect.model_validate_json(content)
    except ValidationError as error:
        return refusal_response(Refusal(422, "invalid_request", describe_invalid_body(error)), dialect.error)
    outcome = await outcome_for_client(request, DialectRequest(body.parts()), body.wanted_model)
    if isinstance(outcome, Refusal):
        return refusal_response(outcome, dialect.error)
    headers = {
        "X-RM-Robust-Activation": "sigmoid" if body.squashes else "none",
        "X-RM-Robust-Checkpoint": outcome.served.checkpoint,
    }
    if outcome.num_cut:
        headers["X-RM-Robust-Cut"] = str(outcome.num_cut)
    return JSONResponse(body.reply(outcome), headers=headers)
