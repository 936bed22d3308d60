"""How weights cross process boundaries without a GPU: packed into chunks of bytes and broadcast over gloo. Torch only, so both ends share it.

    trainer (rank 0)   parameters ─plan_chunks─► chunk ─pack─► uint8 buffer ─broadcast─┐   … last: one checksum per chunk
    engines (rank > 0) load(named tensors) ◄─unpack─ uint8 buffer ◄────────────────────┘   … compared with what arrived

Both ends work on two chunks at a time: the next one is on the wire while this one is packed or loaded.
Dropping the last reference to a group closes its connections, and every peer that waits in a broadcast gets an error at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore, Work  # type: ignore[attr-defined]

from rm_robust.errors import RolloutError

CHUNK_BYTES = 16 * 2**20
"""A chunk holds whole parameters and at most this many bytes, except that a larger parameter is a chunk of its own."""
_ALIGNMENT_BYTES = 8
"""Every parameter starts at a multiple of this inside its chunk: any dtype can be viewed in place, and checksums add up int64 words."""
_TRAINER_RANK = 0


@dataclass(frozen=True)
class ParameterSpec:
    """What a receiver must know of one parameter before its bytes arrive."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """The weights to publish: `metadata()` lists them, iterating yields them in the same order, afresh for every update.

    The same two methods are what vLLM's NCCL sender reads of its own `WeightSource`.
    """

    def metadata(self) -> list[ParameterSpec]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class ModuleWeights:
    """The named parameters of an unsharded, unwrapped module; tied parameters come once, under their first name."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in self._module.named_parameters()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            yield name, parameter.detach()


class NamedWeights:
    """Whole weights that were gathered from the shards of several ranks; another gathering replaces them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def replace(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()


def plan_chunks(specs: Iterable[ParameterSpec]) -> list[list[ParameterSpec]]:
    """Cut parameters, in order, into chunks. Both ends call it on the same list, so they agree on every buffer's size."""
    chunks: list[list[ParameterSpec]] = []
    room_bytes = 0
    for spec in specs:
        if not chunks or _padded_bytes(spec) > room_bytes:
            chunks.append([])
            room_bytes = CHUNK_BYTES
        chunks[-1].append(spec)
        room_bytes -= _padded_bytes(spec)
    return chunks


def chunk_num_bytes(chunk: list[ParameterSpec]) -> int:
    """Length of the chunk's buffer, alignment included."""
    return sum(_padded_bytes(spec) for spec in chunk)


def pack(chunk: list[ParameterSpec], weights: Iterator[tuple[str, Tensor]]) -> Tensor:
    """Copy the chunk's parameters from `weights` into one uint8 CPU buffer.

    Raises RolloutError when `weights` yields anything but what the chunk announces.
    """
    buffer = torch.empty(chunk_num_bytes(chunk), dtype=torch.uint8)
    start = 0
    for spec in chunk:
        name, tensor = next(weights, ("nothing", torch.empty(0)))
        if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
            raise RolloutError(
                f"The weights announce {spec.name} {spec.dtype} {spec.shape} but yield {name} {tensor.dtype} {tuple(tensor.shape)}. "
                "metadata() and iteration must list the same parameters in the same order."
            )
        end = start + spec.num_bytes
        buffer[start:end].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        start += _padded_bytes(spec)
        buffer[end:start].zero_()
    return buffer


def unpack(chunk: list[ParameterSpec], buffer: Tensor) -> list[tuple[str, Tensor]]:
    """The chunk's parameters as views of `buffer`."""
    weights = []
    start = 0
    for spec in chunk:
        weights.append((spec.name, buffer[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)))
        start += _padded_bytes(spec)
    return weights


def checksum(buffer: Tensor) -> int:
    """Sum of the buffer's int64 words modulo 2^64. Finds lost and altered bytes; does not find words that swapped places."""
    return int(buffer.view(torch.int64).sum())


def host_store(address: str, world_size: int, timeout_s: float) -> TCPStore:
    """Start the rendezvous on a free port (`.port`); the trainer does, and keeps it as long as its group."""
    return TCPStore(address, 0, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def join_store(address: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    return TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def open_group(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Connect to all other ranks. Blocks until they have come, at most `timeout_s`; no broadcast waits longer than that either."""
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timedelta(seconds=timeout_s))


def send_weights(group: ProcessGroupGloo, source: WeightSource) -> int:
    """Broadcast every parameter of `source` and return the bytes sent. RuntimeError from gloo when an engine has gone."""
    weights = iter(source)
    checksums: list[int] = []
    num_bytes = 0
    on_wire: Work | None = None
    for chunk in plan_chunks(source.metadata()):
        buffer = pack(chunk, weights)
        checksums.append(checksum(buffer))
        num_bytes += buffer.numel()
        if on_wire is not None:
            on_wire.wait()
        on_wire = _start_broadcast(group, buffer)
    extra = next(weights, None)
    if extra is not None:
        raise RolloutError(f"The weights yield {extra[0]}, which metadata() does not announce. Both must list the same parameters.")
    if on_wire is not None:
        on_wire.wait()
    _start_broadcast(group, torch.tensor(checksums, dtype=torch.int64)).wait()
    return num_bytes


def receive_weights(group: ProcessGroupGloo, specs: list[ParameterSpec], load: Callable[[list[tuple[str, Tensor]]], None]) -> None:
    """Receive what `send_weights` sends and hand each chunk to `load`, which may keep the tensors: no buffer is used twice.

    Raises RolloutError when the bytes of a chunk are not those that were sent; its weights have been loaded by then.
    """
    chunks = plan_chunks(specs)
    checksums: list[int] = []
    arriving = _start_receiving(group, chunks[0])
    for index, chunk in enumerate(chunks):
        buffer, work = arriving
        work.wait()
        if index + 1 < len(chunks):
            arriving = _start_receiving(group, chunks[index + 1])
        checksums.append(checksum(buffer))
        load(unpack(chunk, buffer))
    sent_checksums = torch.empty(len(chunks), dtype=torch.int64)
    _start_broadcast(group, sent_checksums).wait()
    for index, (sent, received) in enumerate(zip(sent_checksums.tolist(), checksums, strict=True)):
        if sent != received:
            raise RolloutError(f"Chunk {index} of {len(chunks)} arrived with checksum {received}, but {sent} was sent. Publish the weights again.")


def _padded_bytes(spec: ParameterSpec) -> int:
    return math.ceil(spec.num_bytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _start_receiving(group: ProcessGroupGloo, chunk: list[ParameterSpec]) -> tuple[Tensor, Work]:
    buffer = torch.empty(chunk_num_bytes(chunk), dtype=torch.uint8)
    return buffer, _start_broadcast(group, buffer)


def _start_broadcast(group: ProcessGroupGloo, buffer: Tensor) -> Work:
    """`dist.broadcast` needs a registered group; the group's own method does not."""
    options = BroadcastOptions()
    options.rootRank = _TRAINER_RANK
    options.rootTensor = 0
    work: Work = group.broadcast([buffer], options)  # type: ignore[attr-defined]
    return work
