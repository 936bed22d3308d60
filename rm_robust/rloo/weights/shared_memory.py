"""Weights of engines on the trainer's own machine: in memory that all of them see, instead of through a socket to each.

    trainer   parameters ─fill─► shared chunk ─checksum broadcast─┐   the memory stays as it is until the engines have confirmed
    engines   load(named tensors) ◄─unpack, same checksum─────────┘

The parameters of a whole policy live in that memory: nothing is copied (`move_parameters`). Those gathered from shards are copied for each update.

The memory has no name in any file system: it is gone with the last process that holds it, however that ends. Linux only.
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
    WeightSource,
    checksum,
    chunk_num_bytes,
    fill,
    plan_chunks,
    require_exhausted,
    start_broadcast,
    unpack,
)

SHARED_CHUNK_BYTES = 4 * 2**20
"""A chunk is still in the processor's cache when an engine reads what the trainer has just written."""


def memory_namespace() -> str:
    """Equal in two processes of one user that can open each other's memory: those of one kernel and one process namespace."""
    if sys.platform != "linux":
        return f"process {os.getpid()} of {socket.gethostname()}"
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{boot_id.read().strip()} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


class MemoryAddress(NamedTuple):
    """Where a process of this machine finds the trainer's memory, and how it knows that this is what it has found.

    A path alone does not say: the trainer's next file gets the number of a descriptor that it has closed, its process's number goes to another one.
    """

    path: str
    device: int
    inode: int


class SharedMemory:
    """Bytes of the trainer's that engines open by `address` while it is not closed."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError when there is not so much memory."""
        self._descriptor = os.memfd_create("policy_weights")
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        status = os.fstat(self._descriptor)
        self.address = MemoryAddress(f"/proc/{os.getpid()}/fd/{self._descriptor}", status.st_dev, status.st_ino)
        self.buffer = _map(self._descriptor, num_bytes)

    def close(self) -> None:
        """Engines that have it open keep it."""
        os.close(self._descriptor)


def open_memory(address: MemoryAddress, num_bytes: int) -> Tensor:
    """The trainer's memory as a uint8 tensor. Raises RolloutError when it is closed; whatever has come into its place is left as it is."""
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
                f"{address.path} is not the {num_bytes} bytes that the trainer announced: it has closed them. Publish the weights again."
            )
        return _map(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _map(descriptor: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def num_shared_bytes(specs: list[ParameterSpec]) -> int:
    return sum(chunk_num_bytes(chunk) for chunk in plan_chunks(specs, SHARED_CHUNK_BYTES))


def _chunks_in(memory: Tensor, specs: list[ParameterSpec]) -> list[tuple[list[ParameterSpec], Tensor]]:
    """Each chunk and its part of the memory, which has `num_shared_bytes(specs)`."""
    chunks = plan_chunks(specs, SHARED_CHUNK_BYTES)
    return list(zip(chunks, memory.split(list(map(chunk_num_bytes, chunks))), strict=True))


def move_parameters(source: ModuleWeights, memory: Tensor) -> None:
    """From now on the trainer updates its parameters where engines read them. They keep the memory alive, also when it is closed."""
    source.move(
        {name: place for chunk, part in _chunks_in(memory, source.metadata()) for name, place in unpack(chunk, part)}
    )


def share_weights(group: ProcessGroupGloo, source: WeightSource, memory: Tensor) -> int:
    """Bring every parameter of `source` into `memory`, announce each chunk when it is there, and return their bytes. RuntimeError when an engine has gone."""
    weights = iter(source)
    announcements = []
    for chunk, part in _chunks_in(memory, source.metadata()):
        fill(part, chunk, weights)
        announcements.append(start_broadcast(group, torch.tensor([checksum(part)])))
    require_exhausted(weights)
    for announcement in announcements:
        announcement.wait()
    return memory.numel()


def load_shared_weights(
    group: ProcessGroupGloo,
    specs: list[ParameterSpec],
    memory: Tensor,
    load: Callable[[list[tuple[str, Tensor]]], None],
) -> None:
    """Hand each chunk that `share_weights` announces to `load`, which may keep the tensors until the update is over, and must not change them.

    Raises RolloutError, before it loads a chunk, when its bytes are not those that were announced.
    """
    chunks = _chunks_in(memory, specs)
    checksums = [torch.empty(1, dtype=torch.int64) for _ in chunks]
    announcements = [start_broadcast(group, checksum_1) for checksum_1 in checksums]
    for index, ((chunk, part), announcement, announced) in enumerate(
        zip(chunks, announcements, checksums, strict=True)
    ):
        announcement.wait()
        found = checksum(part)
        if found != announced.item():
            raise RolloutError(
                f"Shared chunk {index} of {len(chunks)} has checksum {found}, but {announced.item()} was announced. Publish the weights again."
            )
        load(unpack(chunk, part))
