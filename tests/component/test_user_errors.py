"""An error that a user can correct is raised once, in a worker of Ray Train or a task of Ray Data.

It is found again behind the errors that Ray makes of it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch.distributed as dist
from ray.train.v2.api.exceptions import WorkerGroupError

from rm_robust.cluster.failures import origin_of
from rm_robust.cluster.workers import MAX_WORKER_FAILURES, run_on_workers
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import WorkersConfig
from rm_robust.errors import DataError, StorageError

WORKERS = WorkersConfig(num_workers=2, num_cpus_per_worker=0.5)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


def run(tmp_path: Path, error: Exception) -> tuple[Exception, int]:
    """Return what a run raises when its rank 1 raises `error`, and how often rank 1 raised it."""

    def train(config: PipelineConfig, run_dir: Path) -> dict[str, float]:
        """Raise `error` on rank 1. The function is nested, so that Ray sends it by value."""
        if dist.get_rank() == 1:
            with (run_dir / "raised").open("a") as raised:
                raised.write("once\n")
            raise error
        dist.barrier()
        return {}

    with pytest.raises(WorkerGroupError) as failure:
        run_on_workers(train, stage="sft", config=PipelineConfig(name="test"), run_dir=tmp_path, workers=WORKERS)
    return failure.value, len((tmp_path / "raised").read_text().splitlines())


def test_workers_are_not_restarted_after_an_error_that_a_user_can_correct(tmp_path: Path) -> None:
    raised, times = run(tmp_path, StorageError("the disk is full"))
    origin = origin_of(raised)
    assert (type(origin), str(origin), times) == (StorageError, "the disk is full", 1)


@pytest.mark.slow
def test_workers_are_restarted_after_any_other_error(tmp_path: Path) -> None:
    raised, times = run(tmp_path, OSError("a cable was pulled"))
    assert (origin_of(raised), times) == (raised, 1 + MAX_WORKER_FAILURES)


def test_the_error_of_a_ray_data_task_is_made_again_from_its_text() -> None:
    def refuse(batch: object) -> object:
        raise DataError("row 7 is torn")

    with pytest.raises(ray.exceptions.RayTaskError) as failure:
        ray.data.range(3).map_batches(refuse).materialize()
    origin = origin_of(failure.value)
    assert (type(origin), str(origin)) == (DataError, "row 7 is torn")
