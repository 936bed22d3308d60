"""What it means when RLOO's actors do not come up."""

from typing import Any, NoReturn

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from rm_robust.errors import ClusterError
from rm_robust.rloo.actors import TrainersLostError, _started


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (GetTimeoutError("Get timed out"), ClusterError, "not all up after 1800 s.*rloo.trainers and rloo.engine_"),
        (ActorDiedError(), TrainersLostError, "ended while it started: The actor died unexpectedly before finishing this task.$"),
    ],
)
def test_an_actor_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], message: str) -> None:
    def get(calls: Any, *, timeout: float) -> NoReturn:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(error, match=message):
        _started([])
