"""What /openapi.json says about the routes: the shapes of our own replies, the failures, and the schemas of bodies."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rm_robust.scoring.contract import Calibration, ErrorReply

STATUSES = {
    401: "No key, or one that is not known.",
    404: "There is no such model.",
    413: "Too long, too many, or too large; the message names the limit.",
    422: "The body is wrong; the message names the field.",
    429: "The queue is full, or the key has used up its minute: wait for Retry-After seconds.",
    500: "Scoring failed; the log has the request's id.",
    503: "A model has no replica that can answer now; try again.",
    504: "No scores in time; try again.",
}
"""What each status of a failure means."""
SCORING_FAILURES = (401, 413, 422, 429, 500, 503, 504)
"""The failures of every route that scores."""


class ModelEntry(BaseModel):
    """One served model. `template`, `max_length_tokens` and `calibration` are null if the model has none."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The name that requests give."""
    checkpoint: str
    """The hash of its weights and tokenizer."""
    template: str | None
    """The chat template's hash."""
    max_length_tokens: int | None
    """The longest conversation that is scored."""
    calibration: Calibration | None
    """The mean and standard deviation that make a raw score a calibrated one."""
    reload_error: str | None
    """Why the newest deployment's checkpoint is not served; null if it is."""


class ModelList(BaseModel):
    """The served models in OpenAI's envelope, which clients of vLLM read."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"] = "list"
    """OpenAI's word for a list."""
    data: list[ModelEntry]
    """The models. The first one answers requests that name no model."""


class Ready(BaseModel):
    """The reply when every model has a replica that answers, and room in its queue."""

    status: Literal["ready"] = "ready"


class Alive(BaseModel):
    """The reply of a process that answers."""

    status: Literal["alive"] = "alive"


def failures(*statuses: int, shape: Any = ErrorReply) -> dict[int | str, dict[str, Any]]:
    """Return one route's failures for FastAPI. `shape` is the dialect's error body.

    Keys are refused in our own shape, whatever the dialect's is.
    """
    both = shape if shape is ErrorReply else shape | ErrorReply
    shapes = {401: ErrorReply, 429: both, 500: both}
    return {
        status: {"model": shapes.get(status, shape), "description": STATUSES[status]} for status in sorted(statuses)
    }


def body_in_openapi(body: type[BaseModel]) -> dict[str, Any]:
    """Return the request schema, which FastAPI cannot know because the route parses the body itself."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": without_references(schema, definitions)}},
        }
    }


def without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return the schema with every definition written out where it is used. No definition of ours contains itself."""
    if isinstance(schema, list):
        return [without_references(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return without_references(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: without_references(part, definitions) for name, part in schema.items()}
