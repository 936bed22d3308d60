"""The trainer's end of a weight update, with threads of this process as engines."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from torch.distributed import ProcessGroupGloo

from rm_robust.errors import RolloutError
from rm_robust.rloo.weights.broadcast import ModuleWeights, join_store, open_group, start_broadcast
from rm_robust.rloo.weights.publisher import EngineClient, GlooSender

TIMEOUT_S = 20


class ThreadedEngines:
    """Stands in for an EngineClient: two engines that join the sender's group, and receive when the test says so."""

    world_size = 3
    timeout_s = TIMEOUT_S

    def __init__(self, *, shares_memory: bool) -> None:
        self._shares_memory = shares_memory
        self._pool = ThreadPoolExecutor(2)

    def can_share_memory(self) -> bool:
        return self._shares_memory

    def begin_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> list[Future[ProcessGroupGloo]]:
        def join(rank: int) -> ProcessGroupGloo:
            store = join_store(init_info["master_address"], init_info["master_port"], 3, TIMEOUT_S)
            return open_group(store, rank, 3, TIMEOUT_S)

        return [self._pool.submit(join, rank) for rank in (1, 2)]

    def wait(self, calls: list[Future[ProcessGroupGloo]]) -> None:
        self.groups = [call.result(TIMEOUT_S) for call in calls]

    def begin_receive_update(self, update_info: dict[str, Any]) -> list[Any]:
        return []

    def raise_first_failure(self, calls: list[Any]) -> None:
        raise ConnectionError("the first engine is dead")

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(params=[False, True], ids=["broadcast", "shared"])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedEngines]:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    engines = ThreadedEngines(shares_memory=request.param)
    yield engines
    engines.close()


def test_an_engine_that_joins_a_broken_update_late_does_not_wait_for_it(engines: ThreadedEngines) -> None:
    """An engine joins late if it still generates when another one dies.

    The test keeps the error, as Ray keeps it in a reference cycle: the error must not keep the group alive.
    """
    client: EngineClient = engines  # type: ignore[assignment]
    sender = GlooSender(client, ModuleWeights(torch.nn.Linear(64, 64)))
    lost, late = engines.groups
    del lost
    engines.groups = []
    with pytest.raises(ConnectionError, match="the first engine is dead") as broken:
        sender.send()
    sender.close()
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection"):
        start_broadcast(late, torch.zeros(1)).wait()
    assert time.monotonic() - started_s < TIMEOUT_S / 2
    assert not isinstance(broken.value, RolloutError)
