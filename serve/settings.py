"""What one served scorer is: the model behind it, and the replica that `rm_robust.config.ReplicaConfig` describes."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rm_robust.config import ReplicaConfig
from serve.keys import ApiKey


class ScoringAppSettings(ReplicaConfig):
    """Settings of one scoring application. Exactly one of `checkpoint_dir` and `embedded_judge` says what scores."""

    model_name: str = Field(min_length=1)
    """Named in every reply."""
    checkpoint_dir: Path | None = None
    """A committed reward-model checkpoint, on storage that every serving node sees."""
    embedded_judge: bool = False
    """True: the embedded world's gold judge."""
    device: Literal["cpu", "cuda"] = "cpu"
    api_keys: tuple[ApiKey, ...] = ()
    """Who may ask. Needed to deploy, unless `insecure_no_auth` is set."""
    insecure_no_auth: bool = False
    """True: no keys; clients on the same machine only."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.checkpoint_dir is None) != self.embedded_judge:
            raise ValueError(
                f"set either checkpoint_dir or embedded_judge = true, got checkpoint_dir = {self.checkpoint_dir} and embedded_judge = {self.embedded_judge}"
            )
        if self.api_keys and self.insecure_no_auth:
            raise ValueError("insecure_no_auth = true would leave api_keys unused; set one of them")
        if (self.device == "cuda") != (self.num_gpus > 0):
            raise ValueError(f'device = "cuda" and num_gpus > 0 go together, got device = {self.device!r} and num_gpus = {self.num_gpus}')
        if self.max_batch_size > self.max_ongoing_requests:
            raise ValueError(f"a batch of max_batch_size = {self.max_batch_size} can never fill: max_ongoing_requests = {self.max_ongoing_requests}; raise it")
        return self
