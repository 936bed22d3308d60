"""RLOO's actors get the right environment, and failures to start are the right errors."""

from pathlib import Path
from typing import Any, NoReturn, Self

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from rm_robust.cluster.environment import cpu_environment
from rm_robust.cluster.log_lines import environment_of
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ClusterError
from rm_robust.rloo.actors import TrainersLostError, _new_engine, _new_trainer, _started


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (GetTimeoutError("Get timed out"), ClusterError, "not all up after 1800 s.*rloo.trainers and rloo.engine_"),
        (
            ActorDiedError(),
            TrainersLostError,
            "ended while it started: The actor died unexpectedly before finishing this task.$",
        ),
    ],
)
def test_an_actor_that_does_not_start_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], message: str
) -> None:
    def get(calls: Any, *, timeout: float) -> NoReturn:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(error, match=message):
        _started([])


class Remote:
    """Stands in for ray.remote: starts no actor, and keeps the environment that it would get."""

    def __init__(self, actor_class: type) -> None:
        self.environment: dict[str, str] = {}

    def options(self, *, runtime_env: dict[str, dict[str, str]], **_: Any) -> Self:
        self.environment = runtime_env["env_vars"]
        return self

    def remote(self, *_: Any, **__: Any) -> Self:
        return self


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_the_log_lines_of_engines_and_trainers_name_their_run_and_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_gpus: int
) -> None:
    monkeypatch.setattr(ray, "remote", Remote)
    config = PipelineConfig.model_validate(
        {"name": "mine", "rloo": {"engine_num_gpus": num_gpus, "engine_num_threads": 3}}
    )
    on_cpu = {} if num_gpus else cpu_environment(3)
    assert _new_engine(config, tmp_path, 1).environment == environment_of("mine", "rloo", "engine 1") | on_cpu
    assert _new_trainer(config, tmp_path, 2).environment == environment_of("mine", "rloo", "trainer 2")
