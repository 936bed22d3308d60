"""What a scoring service is: its models, who may ask, and how much. `rm_robust.config.run.ReplicaConfig` describes a model's replicas."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rm_robust.config.run import ReplicaConfig
from rm_robust.errors import ConfigError
from rm_robust.runs.storage.copies import local_path
from serve.keys import ApiKey

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
STRICT = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(ReplicaConfig):
    """One served model. Exactly one of `checkpoint_dir` and `embedded_judge` says what scores."""

    model_name: str = Field(pattern=MODEL_NAME_PATTERN)
    """What requests ask for, and every reply names."""
    checkpoint_dir: Annotated[
        Path | None, BeforeValidator(lambda given: local_path(given) if isinstance(given, str) else given)
    ] = None
    """A committed reward-model checkpoint: a path on storage that every serving node sees, or a URI (s3://…, gs://…) of a run in an object store."""
    embedded_judge: bool = False
    """True: the embedded world's gold judge."""
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.checkpoint_dir is None) != self.embedded_judge:
            raise ValueError(
                f"set either checkpoint_dir or embedded_judge = true, got checkpoint_dir = {self.checkpoint_dir} and embedded_judge = {self.embedded_judge}"
            )
        if (self.device == "cuda") != (self.num_gpus > 0):
            raise ValueError(
                f'device = "cuda" and num_gpus > 0 go together, got device = {self.device!r} and num_gpus = {self.num_gpus}'
            )
        return self


class Aggregation(StrEnum):
    """How the members' scores of one completion become one (Coste et al., ICLR 2024, section 3)."""

    MEAN = "mean"
    MIN = "min"
    """Worst-case optimisation."""
    UNCERTAINTY_WEIGHTED = "uncertainty_weighted"
    """Mean - uncertainty_weight * variance."""


class EnsembleSettings(BaseModel):
    """Several of the service's models under one name. Their scores must be on one scale: models trained alike, or `calibrate_members`."""

    model_config = STRICT

    model_name: str = Field(pattern=MODEL_NAME_PATTERN)
    members: tuple[str, ...] = Field(min_length=2)
    aggregation: Aggregation = Aggregation.MEAN
    uncertainty_weight: float = Field(default=0.5, ge=0)
    """Of `uncertainty_weighted`; no other aggregation reads it."""
    calibrate_members: bool = False
    """True: aggregate (score - mean) / std of each member, as its manifest says them."""


class ServiceLimits(BaseModel):
    """What is refused, and when."""

    model_config = STRICT

    max_body_bytes: int = Field(default=8 << 20, ge=1)
    """413 beyond it."""
    max_completions: int = Field(default=1024, ge=1)
    """Of one request, over all its inputs; 413 beyond it."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Per model, waiting or being scored; 429 beyond it."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """The same in tokens. A request that alone has more is refused with 413."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """504 for a request that has no scores by then."""
    batch_timeout_s: float = Field(default=30.0, gt=0)
    """A batch that takes longer hangs: it is computed by another replica, and its own is replaced."""


class ServiceSettings(BaseModel):
    """One scoring service. Its first model answers requests that name none."""

    model_config = STRICT

    models: tuple[ModelSettings, ...] = Field(min_length=1)
    ensembles: tuple[EnsembleSettings, ...] = ()
    api_keys: tuple[ApiKey, ...] = ()
    """Who may ask. Needed to start, unless `insecure_no_auth` is set."""
    insecure_no_auth: bool = False
    """True: no keys; clients on the same machine only."""
    limits: ServiceLimits = ServiceLimits()
    num_fronts: int = Field(default=1, ge=1)
    """Replicas of the HTTP side under Ray Serve; each has queues of its own."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [*(model.model_name for model in self.models), *(ensemble.model_name for ensemble in self.ensembles)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"model names must differ, these do not: {', '.join(twice)}")
        own = {model.model_name for model in self.models}
        for ensemble in self.ensembles:
            unknown = sorted(set(ensemble.members) - own)
            if unknown or len(set(ensemble.members)) < len(ensemble.members):
                raise ValueError(
                    f"the members of {ensemble.model_name} must be different models of {sorted(own)}, got {list(ensemble.members)}"
                )
        if self.api_keys and self.insecure_no_auth:
            raise ValueError("insecure_no_auth = true would leave api_keys unused; set one of them")
        return self


def checked_service(fields: Mapping[str, object], *, source: str) -> ServiceSettings:
    """Raises ConfigError that names `source` and each wrong field, and repeats no value: one may be a key."""
    try:
        return ServiceSettings.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc'])) or 'settings'}: {p['msg']}" for p in error.errors(include_url=False)
        ]
        raise ConfigError(f"{source} are not valid:\n  " + "\n  ".join(problems)) from None
