"""Give weights to engines on the trainer's own machine through shared memory instead of sockets.

    trainer   parameters ─fill─► shared chunk ─checksum broadcast─┐   the memory does not change
    engines   load(named tensors) ◄─unpack, same checksum─────────┘   until the engines have confirmed

The parameters of a policy that is whole live in this memory, so nothing is copied (`move_parameters`). Weights that are
gathered from shards are copied into it for each update. The memory has no name in any file system: it disappears with
the last process that holds it, however that process ends.

This file makes weight updates of CPU engines faster and serves CPU engines only. It works on Linux only: it uses
`memfd_create` and opens the trainer's memory as /proc/<pid>/fd/<number>. It relies on `ProcessGroupGloo`, a name of
torch's C++ bindings that torch does not document, and assigns `Parameter.data` (`ModuleWeights.move`).
"""

import mmap
import os
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from rm_robust.errors import RolloutError
from rm_robust.rloo.weights.broadcast import (
    ModuleWeights,
    ParameterSpec,
    TrainerWeights,
    checksum,
    chunk_num_bytes,
    fill,
    plan_chunks,
    require_exhausted,
    start_broadcast,
    unpack,
)

SHARED_CHUNK_BYTES = 4 * 2**20
"""Largest number of bytes in a chunk of several parameters.

A chunk of this size is still in the processor's cache when an engine reads what the trainer has just written.
"""


def memory_namespace() -> str:
    """Return a text that is equal in two processes that can open each other's memory.

    These are processes of one user on one kernel and in one process namespace.
    """
    if sys.platform != "linux":
        return f"process {os.getpid()} of {socket.gethostname()}"
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{boot_id.read().strip()} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


class MemoryAddress(NamedTuple):
    """The path at which a process on this machine finds the trainer's memory, and the file numbers that identify it.

    The path alone is not enough: the trainer's next file gets the number of a descriptor that was closed, and another
    process can get the trainer's process number.
    """

    path: str
    device: int
    inode: int


class SharedMemory:
    """Memory of the trainer that engines can open by its `address` until it is closed."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate `num_bytes`. Raises OSError when there is not enough memory."""
        self._descriptor = os.memfd_create("policy_weights")
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        status = os.fstat(self._descriptor)
        self.address = MemoryAddress(f"/proc/{os.getpid()}/fd/{self._descriptor}", status.st_dev, status.st_ino)
        self.buffer = _map(self._descriptor, num_bytes)

    def close(self) -> None:
        """Close the memory for new engines; engines that have it open keep it."""
        os.close(self._descriptor)


def open_memory(address: MemoryAddress, num_bytes: int) -> Tensor:
    """Return the trainer's memory as a uint8 tensor.

    Raises RolloutError when the memory is closed. A file that has taken its place at the path is left unchanged.
    """
    try:
        descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise RolloutError(
            f"The trainer's memory {address.path} cannot be opened ({error.strerror}). Publish the weights again."
        ) from error
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino, status.st_size) != (address.device, address.inode, num_bytes):
            raise RolloutError(
                f"{address.path} is not the {num_bytes} bytes that the trainer announced: it has closed them. "
                "Publish the weights again."
            )
        return _map(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _map(descriptor: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def num_shared_bytes(specs: list[ParameterSpec]) -> int:
    """Return how many bytes of memory the parameters need, alignment included."""
    return sum(chunk_num_bytes(chunk) for chunk in plan_chunks(specs, SHARED_CHUNK_BYTES))


def _chunks_in(memory: Tensor, specs: list[ParameterSpec]) -> list[tuple[list[ParameterSpec], Tensor]]:
    """Return each chunk with its part of the memory, which has `num_shared_bytes(specs)` bytes."""
    chunks = plan_chunks(specs, SHARED_CHUNK_BYTES)
    return list(zip(chunks, memory.split(list(map(chunk_num_bytes, chunks))), strict=True))


def move_parameters(weights: ModuleWeights, memory: Tensor) -> None:
    """Move the trainer's parameters into `memory`, so that it updates them where engines read them.

    The parameters keep the memory alive, also after it is closed.
    """
    destinations: dict[str, Tensor] = {}
    for chunk, part in _chunks_in(memory, weights.metadata()):
        destinations.update(unpack(chunk, part))
    weights.move(destinations)


def share_weights(group: ProcessGroupGloo, weights: TrainerWeights, memory: Tensor) -> int:
    """Bring every parameter into `memory`, announce each chunk when it is there, and return the number of bytes.

    Raises RuntimeError when an engine is gone.
    """
    named_tensors = iter(weights)
    announcements = []
    for chunk, part in _chunks_in(memory, weights.metadata()):
        fill(part, chunk, named_tensors)
        announcements.append(start_broadcast(group, torch.tensor([checksum(part)])))
    require_exhausted(named_tensors)
    for announcement in announcements:
        announcement.wait()
    return memory.numel()


def load_shared_weights(
    group: ProcessGroupGloo,
    specs: list[ParameterSpec],
    memory: Tensor,
    load: Callable[[list[tuple[str, Tensor]]], None],
) -> None:
    """Pass each chunk that `share_weights` announces to `load`.

    `load` may keep the tensors until the update is over, and must not change them. Raises RolloutError when the bytes
    of a chunk are not those that were announced; that chunk is not loaded.
    """
    chunks = _chunks_in(memory, specs)
    checksums = [torch.empty(1, dtype=torch.int64) for _ in chunks]
    announcements = [start_broadcast(group, checksum_1) for checksum_1 in checksums]
    for index, ((chunk, part), announcement, announced) in enumerate(
        zip(chunks, announcements, checksums, strict=True)
    ):
        announcement.wait()
        actual = checksum(part)
        if actual != announced.item():
            raise RolloutError(
                f"Shared chunk {index} of {len(chunks)} has checksum {actual}, but {announced.item()} was announced. "
                "Publish the weights again."
            )
        load(unpack(chunk, part))
