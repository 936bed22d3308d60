"""Weights in shared memory: between two threads, or between two processes where the process matters."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from rm_robust.errors import RolloutError
from rm_robust.rloo.weights import shared_memory
from rm_robust.rloo.weights.broadcast import (
    ModuleWeights,
    checksum,
    host_store,
    join_store,
    open_group,
    start_broadcast,
)
from rm_robust.rloo.weights.shared_memory import (
    SharedMemory,
    load_shared_weights,
    memory_namespace,
    move_parameters,
    num_shared_bytes,
    open_memory,
    share_weights,
)

TIMEOUT_S = 20.0


@pytest.fixture
def groups() -> tuple[ProcessGroupGloo, ProcessGroupGloo]:
    store = host_store("127.0.0.1", 2, TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(lambda: open_group(join_store("127.0.0.1", store.port, 2, TIMEOUT_S), 1, 2, TIMEOUT_S))
        return open_group(store, 0, 2, TIMEOUT_S), engine.result()


@pytest.mark.parametrize("is_moved", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 64, 2**20])
def test_shared_parameters_are_the_trainers_update_after_update(
    groups: tuple[ProcessGroupGloo, ProcessGroupGloo], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, is_moved: bool
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_CHUNK_BYTES", chunk_bytes)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7, dtype=torch.bfloat16))
    weights = ModuleWeights(module)
    memory = SharedMemory(num_shared_bytes(weights.metadata()))
    engines_view = open_memory(memory.address, memory.buffer.numel())
    if is_moved:
        before = copy.deepcopy(module.state_dict())
        move_parameters(weights, memory.buffer)
        assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        received: dict[str, Tensor] = {}
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_shared_weights, groups[1], weights.metadata(), engines_view, received.update)
            num_bytes = share_weights(groups[0], weights, memory.buffer)
            loading.result()
        # 15 and 3 float32, 21 and 7 bfloat16, each padded to a multiple of 8 bytes
        assert num_bytes == memory.buffer.numel() == 64 + 16 + 48 + 16
        assert all(torch.equal(received[name], parameter) for name, parameter in module.named_parameters())
    memory.close()
    assert all(torch.equal(received[name], parameter) for name, parameter in module.named_parameters())


def test_an_optimizer_updates_moved_parameters_where_engines_read_them() -> None:
    module = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    weights = ModuleWeights(module)
    memory = torch.zeros(num_shared_bytes(weights.metadata()), dtype=torch.uint8)
    # the graph is older than the move, as when an engine is replaced between `measure` and `update`
    loss = module(torch.ones(4)).square().sum()
    move_parameters(weights, memory)
    loss.backward()
    before = memory.clone()
    optimizer.step()
    assert not torch.equal(memory, before)
    assert torch.equal(memory[:32].view(torch.float32).view(2, 4), module.weight)


def test_altered_memory_is_an_error_and_is_not_loaded(groups: tuple[ProcessGroupGloo, ProcessGroupGloo]) -> None:
    weights = ModuleWeights(torch.nn.Linear(4, 4))
    memory = torch.zeros(num_shared_bytes(weights.metadata()), dtype=torch.uint8)
    loaded: list[tuple[str, Tensor]] = []
    start_broadcast(groups[0], torch.tensor([checksum(memory) + 1]))
    with pytest.raises(RolloutError, match="Shared chunk 0 of 1 has checksum 0, but 1 was announced"):
        load_shared_weights(groups[1], weights.metadata(), memory, loaded.extend)
    assert not loaded


def test_another_process_opens_the_memory_by_its_address_until_it_is_closed() -> None:
    memory = SharedMemory(1000)
    memory.buffer.fill_(7)
    path, device, inode = memory.address
    code = (
        "import sys; from rm_robust.rloo.weights.shared_memory import *; print(memory_namespace()); "
        "print(int(open_memory(MemoryAddress(sys.argv[1], *map(int, sys.argv[2:])), 1000).sum()))"
    )
    command = [sys.executable, "-c", code, path, str(device), str(inode)]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.splitlines() == [
        memory_namespace(),
        "7000",
    ]
    memory.close()
    with pytest.raises(
        RolloutError, match=f"{path} cannot be opened .No such file or directory.. Publish the weights again"
    ):
        open_memory(memory.address, 1000)


def test_a_file_with_the_descriptor_number_of_closed_memory_is_refused_and_not_changed(tmp_path: Path) -> None:
    """A failing trainer reads its source file for the traceback just when an engine opens the closed memory."""
    memory = SharedMemory(1000)
    memory.close()
    source_file = tmp_path / "source.py"
    source_file.write_text("pass\n")
    with source_file.open("r+b") as opened:
        assert memory.address.path == f"/proc/{os.getpid()}/fd/{opened.fileno()}"
        with pytest.raises(RolloutError, match="is not the 1000 bytes that the trainer announced"):
            open_memory(memory.address, 1000)
    assert source_file.read_text() == "pass\n"


def test_later_memory_with_the_same_descriptor_number_is_not_taken_for_the_earlier() -> None:
    earlier = SharedMemory(1000)
    del earlier.buffer  # nothing holds the memory now, so its inode is free too
    earlier.close()
    later = SharedMemory(1000)
    assert later.address.path == earlier.address.path
    with pytest.raises(RolloutError, match="is not the 1000 bytes"):
        open_memory(earlier.address, 1000)
    with pytest.raises(RolloutError, match="is not the 2000 bytes"):
        open_memory(later.address, 2000)
    assert open_memory(later.address, 1000).numel() == 1000
    later.close()
