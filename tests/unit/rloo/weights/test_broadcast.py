"""The wire format of weight updates, and both ends of it over real gloo between two threads."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rm_robust.cluster.environment import INTERFACE_VARIABLE
from rm_robust.errors import RolloutError
from rm_robust.rloo.weights import broadcast
from rm_robust.rloo.weights.broadcast import (
    CHUNK_BYTES,
    ModuleWeights,
    ParameterSpec,
    checksum,
    chunk_num_bytes,
    host_store,
    join_store,
    open_group,
    pack,
    plan_chunks,
    receive_weights,
    send_weights,
    unpack,
)

TIMEOUT_S = 20.0


class ListedWeights:
    """Yields weights from a list; `announced` may differ from what is yielded."""

    def __init__(self, weights: list[tuple[str, Tensor]], announced: list[tuple[str, Tensor]] | None = None) -> None:
        self._weights = weights
        self._announced = weights if announced is None else announced

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._announced]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)


def mixed_weights() -> list[tuple[str, Tensor]]:
    """Return weights of odd sizes and dtypes, so that none is aligned by luck."""
    return [
        ("bfloat16", torch.arange(3, dtype=torch.bfloat16)),
        ("float32", torch.arange(10, dtype=torch.float32).view(5, 2).t()),
        ("scalar", torch.tensor(7.0, dtype=torch.float16)),
        ("bytes", torch.arange(13, dtype=torch.uint8)),
    ]


def open_pair() -> tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo]:
    """Return the trainer's end and the engine's end of a group."""
    store = host_store("127.0.0.1", 2, TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(lambda: open_group(join_store("127.0.0.1", store.port, 2, TIMEOUT_S), 1, 2, TIMEOUT_S))
        return open_group(store, 0, 2, TIMEOUT_S), engine.result()


@pytest.fixture
def groups() -> tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo]:
    return open_pair()


def transfer(
    groups: tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo], weights: ListedWeights
) -> tuple[int, dict[str, Tensor]]:
    """Send the weights from one end to the other; return the bytes sent and the tensors received."""
    received: dict[str, Tensor] = {}
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_weights, groups[1], weights.metadata(), lambda chunk: received.update(chunk))
        num_bytes = send_weights(groups[0], weights)
        receiving.result()
    return num_bytes, received


def test_a_group_listens_on_the_interface_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """rm_robust/cluster/environment.py relies on this."""
    monkeypatch.setenv(INTERFACE_VARIABLE, "no-such-one")
    with pytest.raises(RuntimeError, match="Unable to find address for: no-such-one"):
        open_group(host_store("127.0.0.1", 1, TIMEOUT_S), 0, 1, TIMEOUT_S)


def test_parameters_survive_packing_whatever_their_dtype_and_layout() -> None:
    weights = mixed_weights()
    listed_weights = ListedWeights(weights)
    (chunk,) = plan_chunks(listed_weights.metadata(), CHUNK_BYTES)
    buffer = pack(chunk, iter(listed_weights))
    assert buffer.numel() == chunk_num_bytes(chunk) == 8 + 40 + 8 + 16
    for (name, tensor), (sent_name, sent) in zip(unpack(chunk, buffer), weights, strict=True):
        assert (name, tensor.dtype) == (sent_name, sent.dtype)
        assert torch.equal(tensor, sent)


def test_chunks_hold_whole_parameters_up_to_their_limit_and_a_larger_one_alone() -> None:
    specs = [
        ParameterSpec(name, torch.float32, (length,))
        for name, length in [("a", 4), ("b", 3), ("c", 1), ("big", 100), ("d", 8), ("e", 1)]
    ]
    assert [[spec.name for spec in chunk] for chunk in plan_chunks(specs, 32)] == [
        ["a", "b"],
        ["c"],
        ["big"],
        ["d"],
        ["e"],
    ]


def test_a_checksum_is_the_sum_of_int64_words_and_changes_with_every_byte() -> None:
    assert checksum(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)) == 1 + 2 + 256
    buffer = torch.arange(64, dtype=torch.uint8)
    for index in range(64):
        altered = buffer.clone()
        altered[index] += 1
        assert checksum(altered) != checksum(buffer)


def test_tied_parameters_are_published_once() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False))
    module[1].weight = module[0].weight
    assert [spec.name for spec in ModuleWeights(module).metadata()] == ["0.weight"]


def test_unnumbered_parameters_come_first_and_matrices_of_a_layer_before_its_vectors() -> None:
    layers = [torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2), "k": torch.nn.Linear(2, 2)}) for _ in range(2)]
    module = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList(layers),
            "norm": torch.nn.LayerNorm(2),
            "head": torch.nn.Linear(2, 3, bias=False),
        }
    )
    names = [spec.name for spec in ModuleWeights(module).metadata()]
    of_layers = [f"layers.{n}.{name}" for n in range(2) for name in ("q.weight", "k.weight", "q.bias", "k.bias")]
    assert names == ["head.weight", "norm.weight", "norm.bias", *of_layers]


def test_embedding_and_head_are_published_before_the_numbered_layers() -> None:
    module = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(1, 1, bias=False), "layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)])}
    )
    module["head"] = torch.nn.Linear(1, 1, bias=False)
    weights = ModuleWeights(module)
    assert [name for name, _ in weights] == ["embed.weight", "head.weight", "layers.0.weight", "layers.0.bias"]
    assert [spec.name for spec in weights.metadata()] == [name for name, _ in weights]


def test_a_parameter_alone_in_its_chunk_is_sent_from_its_own_memory_and_any_other_is_copied() -> None:
    storage = torch.arange(12, dtype=torch.float32)
    sendable = {"all of it": storage, "an aligned part": storage[2:4]}
    copied = {"at an odd offset": storage[1:3], "odd length": storage[:3], "transposed": storage.view(3, 4).t()}
    for name, tensor in (sendable | copied).items():
        weights = ListedWeights([(name, tensor)])
        (chunk,) = plan_chunks(weights.metadata(), CHUNK_BYTES)
        buffer = pack(chunk, iter(weights))
        assert (buffer.data_ptr() == tensor.data_ptr()) == (name in sendable), name
        assert torch.equal(unpack(chunk, buffer)[0][1], tensor)
        assert isinstance(checksum(buffer), int)


@pytest.mark.parametrize("window_bytes", [1, 2**20])
def test_chunks_arrive_in_order_however_many_are_under_way(
    groups: tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo], monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(broadcast, "CHUNK_BYTES", 8)
    monkeypatch.setattr(broadcast, "WINDOW_BYTES", window_bytes)
    weights = [(f"p{index}", torch.full((1 + index % 5,), float(index))) for index in range(40)]
    _, received = transfer(groups, ListedWeights(weights))
    assert list(received) == [name for name, _ in weights]
    assert all(torch.equal(received[name], tensor) for name, tensor in weights)


@pytest.mark.parametrize("chunk_bytes", [1, 16, 2**20])
def test_both_ends_of_a_broadcast_hold_the_same_parameters(
    groups: tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(broadcast, "CHUNK_BYTES", chunk_bytes)
    weights = mixed_weights()
    num_bytes, received = transfer(groups, ListedWeights(weights))
    assert num_bytes == 72
    assert list(received) == [name for name, _ in weights]
    assert all(torch.equal(received[name], tensor) for name, tensor in weights)


def test_altered_bytes_are_an_error(groups: tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo]) -> None:
    """The sender announces the checksum of other bytes than it sends."""
    weights = [("weight", torch.ones(8))]
    chunk = plan_chunks(ListedWeights(weights).metadata(), CHUNK_BYTES)[0]
    buffer = pack(chunk, iter(weights))
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_weights, groups[1], chunk, lambda weights: None)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for tensor in (buffer, torch.tensor([checksum(buffer) + 1])):
            groups[0].broadcast([tensor], options).wait()
        with pytest.raises(RolloutError, match="Chunk 0 of 1 arrived with checksum"):
            receiving.result()


@pytest.mark.parametrize(
    ("yielded", "message"),
    [
        ([("a", torch.zeros(2)), ("c", torch.zeros(3))], "but yield c"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(4))], "but yield b"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(3, dtype=torch.bfloat16))], "but yield b"),
        ([("a", torch.zeros(2))], "but yield nothing"),
    ],
)
def test_weights_that_differ_from_their_announcement_are_refused(
    yielded: list[tuple[str, Tensor]], message: str
) -> None:
    weights = ListedWeights(yielded, announced=[("a", torch.zeros(2)), ("b", torch.zeros(3))])
    (chunk,) = plan_chunks(weights.metadata(), CHUNK_BYTES)
    with pytest.raises(RolloutError, match=message):
        pack(chunk, iter(weights))


def test_a_lost_peer_is_an_error_at_once() -> None:
    trainer, engine = open_pair()
    del engine
    start_s = time.monotonic()
    with pytest.raises(RuntimeError):
        send_weights(trainer, ListedWeights([("weight", torch.zeros(2**20))]))
    assert time.monotonic() - start_s < TIMEOUT_S / 4


def test_a_peer_that_hangs_is_an_error_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "TIMEOUT_S", 1.0)
    trainer, _engine = open_pair()
    with pytest.raises(RuntimeError, match="[Tt]imed out"):
        send_weights(trainer, ListedWeights([("weight", torch.zeros(2**22))]))
