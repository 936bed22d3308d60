"""The settings of a scoring service: its models, who may ask, and how much.

`rm_robust.config.run.ReplicaConfig` has the settings of a model's replicas.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rm_robust.config.run import ReplicaConfig
from rm_robust.errors import ConfigError
from rm_robust.runs import files as run_files
from serve.keys import ApiKey

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
STRICT = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(ReplicaConfig):
    """One served model. Exactly one of `checkpoint_dir` and `embedded_judge` must be set; it says what scores."""

    model_name: str = Field(pattern=MODEL_NAME_PATTERN)
    """The name that requests ask for and that every reply gives."""
    checkpoint_dir: Annotated[
        Path | None, BeforeValidator(lambda given: run_files.locate(given) if isinstance(given, str) else given)
    ] = None
    """A committed reward-model checkpoint.

    It is a path on storage that every serving node sees, or a URI (s3://…, gs://…) of a run in an object store.
    """
    embedded_judge: bool = False
    """True: the embedded world's gold judge scores."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of each replica. `cuda` and num_gpus > 0 go together."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.checkpoint_dir is None) != self.embedded_judge:
            raise ValueError(
                "set either checkpoint_dir or embedded_judge = true, "
                f"got checkpoint_dir = {self.checkpoint_dir} and embedded_judge = {self.embedded_judge}"
            )
        if (self.device == "cuda") != (self.num_gpus > 0):
            raise ValueError(
                'device = "cuda" and num_gpus > 0 go together, '
                f"got device = {self.device!r} and num_gpus = {self.num_gpus}"
            )
        return self


class Aggregation(StrEnum):
    """How the members' scores of one completion become one score (Coste et al., ICLR 2024, section 3).

    EnsembleSettings.aggregation says what each is.
    """

    MEAN = "mean"
    MIN = "min"
    UNCERTAINTY_WEIGHTED = "uncertainty_weighted"


class EnsembleSettings(BaseModel):
    """Several of the service's models under one name.

    Their scores must be on one scale: either the models are trained alike, or `calibrate_members` is set.
    """

    model_config = STRICT

    model_name: str = Field(pattern=MODEL_NAME_PATTERN)
    """The name that requests ask for and that every reply gives. It must differ from the names of the models."""
    members: tuple[str, ...] = Field(min_length=2)
    """Names of at least two models of this service, each given once."""
    aggregation: Aggregation = Aggregation.MEAN
    """How the members' scores of one completion become one score. `mean`: their mean. `min`: the lowest of them
    (worst-case optimisation). `uncertainty_weighted`: the mean minus uncertainty_weight times their variance."""
    uncertainty_weight: float = Field(default=0.5, ge=0)
    """The weight of the variance in `uncertainty_weighted`; no other aggregation reads it."""
    calibrate_members: bool = False
    """True: aggregate (score - mean) / std of each member, with the mean and the std of its manifest."""


class ServiceLimits(BaseModel):
    """The limits of a service: what it refuses, and with which HTTP status."""

    model_config = STRICT

    max_body_bytes: int = Field(default=8 << 20, ge=1)
    """Bytes of a request's body; a larger one is refused with 413."""
    max_completions: int = Field(default=1024, ge=1)
    """Completions of one request, over all its inputs; a request with more is refused with 413."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Requests per model that wait or are being scored; any more are refused with 429."""
    max_queued_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens of those requests; any more are refused with 429, and a request that alone has more with 413."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a request that has no scores is answered with 504."""
    batch_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds after which a batch is taken to hang: another replica computes it, and its own replica is replaced."""


class ServiceSettings(BaseModel):
    """One scoring service. Its first model answers requests that name no model."""

    model_config = STRICT

    models: tuple[ModelSettings, ...] = Field(min_length=1)
    """The served models, with names that differ. The first answers requests that name no model."""
    ensembles: tuple[EnsembleSettings, ...] = ()
    """Further names, each of which stands for several of the models."""
    api_keys: tuple[ApiKey, ...] = ()
    """The keys of those who may ask, each with its name, sha256 and, where it is limited, requests_per_minute. At least
    one is needed, unless `insecure_no_auth` is set. A service file of `rm-robust serve` sets neither of these two:
    --keys, RM_ROBUST_API_KEYS or --insecure-no-auth says who may ask."""
    insecure_no_auth: bool = False
    """True: no key is needed, and only clients on the same machine are answered."""
    limits: ServiceLimits = ServiceLimits()
    """How much the service takes at once."""
    num_fronts: int = Field(default=1, ge=1)
    """The number of replicas of the HTTP side under Ray Serve; each has queues of its own."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = [*(model.model_name for model in self.models), *(ensemble.model_name for ensemble in self.ensembles)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"model names must differ, these do not: {', '.join(duplicates)}")
        model_names = {model.model_name for model in self.models}
        for ensemble in self.ensembles:
            unknown = sorted(set(ensemble.members) - model_names)
            if unknown or len(set(ensemble.members)) < len(ensemble.members):
                raise ValueError(
                    f"the members of {ensemble.model_name} must be different models of {sorted(model_names)}, "
                    f"got {list(ensemble.members)}"
                )
        if self.api_keys and self.insecure_no_auth:
            raise ValueError("insecure_no_auth = true would leave api_keys unused; set one of them")
        return self


def checked_service(fields: Mapping[str, object], *, source: str) -> ServiceSettings:
    """Return the settings that the fields give.

    Raises ConfigError that names `source` and each wrong field, and repeats no value, because one may be a key.
    """
    try:
        return ServiceSettings.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigError(f"{source} are not valid:\n  " + "\n  ".join(problems)) from None
