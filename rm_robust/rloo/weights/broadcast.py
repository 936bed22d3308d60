"""Send weights between processes without a GPU: pack them into chunks of bytes and broadcast these over gloo.

    trainer (rank 0)   parameters ─plan_chunks─► chunk ─pack─► uint8 buffer ─broadcast─┐   … last: the chunks' checksums
    engines (rank > 0) load(named tensors) ◄─unpack─ uint8 buffer ◄────────────────────┘   … compared with what arrived

Both ends use this file, so it imports torch only. Both have several chunks under way: further chunks are on the wire
while one is packed or loaded. A large parameter is sent from its own memory. Dropping the last reference to a group
closes its connections, and every peer that waits in a broadcast gets an error at once.

This file serves CPU engines only; GPU engines get their weights from vLLM's own NCCL sender (publisher.py). It relies
on names of torch's C++ bindings that torch does not document: `ProcessGroupGloo` with its own `broadcast` method,
`BroadcastOptions` with `rootRank` and `rootTensor`, and `Work`.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore, Work  # type: ignore[attr-defined]

from rm_robust.errors import RolloutError

CHUNK_BYTES = 2**20
"""Largest number of bytes in a chunk of several parameters; a larger parameter is a chunk of its own."""
WINDOW_BYTES = 32 * 2**20
"""Each end starts further chunks while those under way hold at most this many bytes; one may always be under way."""
_ALIGNMENT_BYTES = 8
"""Every parameter starts at a multiple of this many bytes in its chunk.

Any dtype can then be viewed in place, and a checksum can add up int64 words.
"""
_TRAINER_RANK = 0
_NUMBERED_LAYER = re.compile(r".*?(^|\.)\d+(?=\.)")
"""Matches the part of a parameter's name that names its layer, such as model.layers.11."""


@dataclass(frozen=True)
class ParameterSpec:
    """The description of one parameter that a receiver needs before its bytes arrive."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class TrainerWeights(Protocol):
    """The trainer's weights to publish: `metadata()` lists them, and iterating yields them in the same order.

    Every update iterates again. A tensor that was yielded must not change until the update is over, because it may be
    sent from where it lies. vLLM's NCCL sender calls the same two methods of its own `WeightSource`.
    """

    def metadata(self) -> list[ParameterSpec]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class ModuleWeights:
    """The named parameters of an unsharded, unwrapped module; tied parameters come once, under their first name.

    Parameters outside the numbered layers come first: an engine needs longest for embedding and output head, and can
    work on them while the layers are still on the wire. In a layer, matrices come before vectors, so that the matrices
    that an engine fuses lie side by side.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in self._parameters()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self._parameters())

    def move(self, destinations: dict[str, Tensor]) -> None:
        """Move each CPU parameter that has a destination there; it stays the same Parameter with the same value."""
        for name, parameter in self._parameters():
            if name in destinations and parameter.device.type == "cpu":
                parameter.data = destinations[name].copy_(parameter.detach())

    def _parameters(self) -> list[tuple[str, Tensor]]:
        layers: dict[str, int] = {"": -1}

        def order(named: tuple[str, Tensor]) -> tuple[int, bool]:
            layer = _NUMBERED_LAYER.match(named[0])
            return layers.setdefault(layer.group() if layer else "", len(layers)), named[1].dim() < 2

        return sorted(self._module.named_parameters(), key=order)


class NamedWeights:
    """Whole weights that were gathered from the shards of several ranks; `replace` sets those of the next gathering."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def replace(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()


def plan_chunks(specs: Iterable[ParameterSpec], chunk_bytes: int) -> list[list[ParameterSpec]]:
    """Cut parameters, in order, into chunks of at most `chunk_bytes`; a larger parameter is a chunk of its own.

    Both ends call it with the same list, so they agree on the length of every buffer.
    """
    chunks: list[list[ParameterSpec]] = []
    room_bytes = 0
    for spec in specs:
        if not chunks or _padded_bytes(spec) > room_bytes:
            chunks.append([])
            room_bytes = chunk_bytes
        chunks[-1].append(spec)
        room_bytes -= _padded_bytes(spec)
    return chunks


def chunk_num_bytes(chunk: list[ParameterSpec]) -> int:
    """Return the length of the chunk's buffer in bytes, alignment included."""
    return sum(_padded_bytes(spec) for spec in chunk)


def fill(buffer: Tensor, chunk: list[ParameterSpec], named_tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy the chunk's parameters from `named_tensors` into a uint8 CPU buffer of the chunk's length.

    A parameter that already lies at its place in the buffer is not copied. Raises RolloutError when `named_tensors`
    yields anything but what the chunk announces.
    """
    start = 0
    for spec in chunk:
        tensor = _next_tensor(spec, named_tensors)
        end = start + spec.num_bytes
        if tensor.data_ptr() != buffer[start:end].data_ptr():
            buffer[start:end].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        start += _padded_bytes(spec)
        buffer[end:start].zero_()


def pack(chunk: list[ParameterSpec], named_tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
    """Return the chunk as one uint8 CPU buffer.

    The buffer is a copy, or the memory of the chunk's only parameter itself if that can be sent. Raises what `fill`
    raises.
    """
    if len(chunk) == 1:
        tensor = _next_tensor(chunk[0], named_tensors)
        if _is_sendable(tensor):
            return tensor.view(-1).view(torch.uint8)
        named_tensors = iter([(chunk[0].name, tensor)])
    buffer = torch.empty(chunk_num_bytes(chunk), dtype=torch.uint8)
    fill(buffer, chunk, named_tensors)
    return buffer


def require_exhausted(named_tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Raise RolloutError when there are more weights than were announced."""
    extra = next(named_tensors, None)
    if extra is not None:
        raise RolloutError(
            f"The weights yield {extra[0]}, which metadata() does not announce. Both must list the same parameters."
        )


def unpack(chunk: list[ParameterSpec], buffer: Tensor) -> list[tuple[str, Tensor]]:
    """Return the chunk's parameters as views of `buffer`."""
    named_tensors = []
    start = 0
    for spec in chunk:
        named_tensors.append((spec.name, buffer[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)))
        start += _padded_bytes(spec)
    return named_tensors


def checksum(buffer: Tensor) -> int:
    """Return the sum of the buffer's int64 words modulo 2^64.

    It detects lost and altered bytes, but not words that have swapped places.
    """
    return int(buffer.view(torch.int64).sum())


def host_store(address: str, world_size: int, timeout_s: float) -> TCPStore:
    """Start the rendezvous on a free port (`.port`); the trainer keeps the store as long as its group."""
    return TCPStore(
        address, 0, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def join_store(address: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    """Connect to the trainer's rendezvous."""
    return TCPStore(
        address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def open_group(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Connect to all other ranks; blocks until they have joined, at most `timeout_s`.

    No broadcast waits longer than `timeout_s` either.
    """
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timedelta(seconds=timeout_s))


def send_weights(group: ProcessGroupGloo, weights: TrainerWeights) -> int:
    """Broadcast every parameter and return the number of bytes sent. Raises RuntimeError when an engine is gone."""
    named_tensors = iter(weights)
    checksums: list[int] = []
    on_wire: deque[tuple[int, Work]] = deque()
    chunks = plan_chunks(weights.metadata(), CHUNK_BYTES)
    for chunk in chunks:
        buffer = pack(chunk, named_tensors)
        on_wire.append((buffer.numel(), start_broadcast(group, buffer)))
        checksums.append(checksum(buffer))
        while len(on_wire) > 1 and sum(num_bytes for num_bytes, _ in on_wire) > WINDOW_BYTES:
            on_wire.popleft()[1].wait()
    require_exhausted(named_tensors)
    for _, work in on_wire:
        work.wait()
    start_broadcast(group, torch.tensor(checksums, dtype=torch.int64)).wait()
    return sum(chunk_num_bytes(chunk) for chunk in chunks)


def receive_weights(
    group: ProcessGroupGloo, specs: list[ParameterSpec], load: Callable[[list[tuple[str, Tensor]]], None]
) -> None:
    """Receive what `send_weights` sends and pass each chunk to `load`.

    `load` may keep the tensors, because no buffer is used twice. Raises RolloutError when the bytes of a chunk are not
    those that were sent; its weights are already loaded then.
    """
    chunks = plan_chunks(specs, CHUNK_BYTES)
    checksums: list[int] = []
    for chunk, buffer in _receive_in_order(group, chunks):
        checksums.append(checksum(buffer))
        load(unpack(chunk, buffer))
    sent_checksums = torch.empty(len(chunks), dtype=torch.int64)
    start_broadcast(group, sent_checksums).wait()
    for index, (sent, received) in enumerate(zip(sent_checksums.tolist(), checksums, strict=True)):
        if sent != received:
            raise RolloutError(
                f"Chunk {index} of {len(chunks)} arrived with checksum {received}, but {sent} was sent. "
                "Publish the weights again."
            )


def start_broadcast(group: ProcessGroupGloo, buffer: Tensor) -> Work:
    """Send a buffer from the trainer, or receive it.

    `dist.broadcast` needs a registered group; the group's own method does not.
    """
    options = BroadcastOptions()
    options.rootRank = _TRAINER_RANK
    options.rootTensor = 0
    work: Work = group.broadcast([buffer], options)  # type: ignore[attr-defined]
    return work


def _next_tensor(spec: ParameterSpec, named_tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
    """Return the next tensor; raise RolloutError when it is not what `spec` announces."""
    name, tensor = next(named_tensors, ("nothing", torch.empty(0)))
    if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
        raise RolloutError(
            f"The weights announce {spec.name} {spec.dtype} {spec.shape} "
            f"but yield {name} {tensor.dtype} {tuple(tensor.shape)}. "
            "metadata() and iteration must list the same parameters in the same order."
        )
    return tensor


def _padded_bytes(spec: ParameterSpec) -> int:
    return math.ceil(spec.num_bytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _is_sendable(tensor: Tensor) -> bool:
    """Return whether a parameter's own memory can be sent: on CPU, contiguous, and aligned like a chunk."""
    start, end = tensor.storage_offset() * tensor.itemsize, (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (start % _ALIGNMENT_BYTES or end % _ALIGNMENT_BYTES)
    )


def _receive_in_order(
    group: ProcessGroupGloo, chunks: list[list[ParameterSpec]]
) -> Iterator[tuple[list[ParameterSpec], Tensor]]:
    """Yield each chunk and its buffer once it has arrived; further chunks arrive while the caller works on it."""
    arriving: deque[tuple[list[ParameterSpec], Tensor, Work]] = deque()

    def arrived() -> tuple[list[ParameterSpec], Tensor]:
        chunk, buffer, work = arriving.popleft()
        work.wait()
        return chunk, buffer

    for chunk in chunks:
        buffer = torch.empty(chunk_num_bytes(chunk), dtype=torch.uint8)
        arriving.append((chunk, buffer, start_broadcast(group, buffer)))
        del buffer
        while len(arriving) > 1 and sum(pending.numel() for _, pending, _ in arriving) > WINDOW_BYTES:
            yield arrived()
    while arriving:
        yield arrived()
