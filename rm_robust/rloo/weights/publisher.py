"""The trainer's end of weight updates: send the policy's weights to every vLLM engine and have each confirm the version.

    policy ─WeightPublisher.publish(v)─► weights ─► every engine loads, checks the bytes, scores the probe ─┐
                      └──────────────► the trainer scores the probe itself, meanwhile ────────────────────────┴─► compared, v confirmed
                                          (any failure: connections closed, one retry over new ones, then RolloutError)

`gloo` (CPU) is ours and imports nothing of vLLM here: importing vLLM's trainer factory would cost a trainer 2.4 s and 120 MB.
`nccl` (GPUs) is vLLM's own sender; it was never run by us (no GPU was at hand).
"""

import contextlib
import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from torch import nn

from rm_robust.cluster.environment import free_port
from rm_robust.errors import RolloutError
from rm_robust.rloo.weights.broadcast import ModuleWeights, WeightSource, host_store, open_group, send_weights
from rm_robust.rloo.weights.probe import Probe
from rm_robust.rloo.weights.shared_memory import (
    SharedMemory,
    memory_namespace,
    move_parameters,
    num_shared_bytes,
    share_weights,
)

logger = logging.getLogger(__name__)
_CONNECTION_ERRORS = (RayError, RuntimeError, RolloutError)
"""What a lost engine or connection looks like: Ray's and gloo's errors (gloo raises RuntimeError), and an engine's own refusal."""


@dataclass(frozen=True)
class SyncReport:
    """One successful publication, acknowledged by `num_engines` engines."""

    version: int
    num_bytes: int
    """Bytes of one copy of the weights as sent."""
    load_seconds: float
    """Until every engine had loaded the weights and checked their bytes."""
    seconds: float
    """Until every engine had confirmed the version, the probe included."""
    num_engines: int


def register_gloo_backend() -> None:
    """Make `weight_transfer_config={"backend": "gloo"}` known to vLLM; vLLM calls it in each of its processes (entry point)."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # already registered: vLLM may load its plugins more than once in a process
        WeightTransferEngineFactory.register_engine(
            "gloo", "rm_robust.rloo.weights.vllm_transfer", "GlooWeightTransferEngine"
        )


class WeightPublisher:
    """Lives in the trainer process that holds the whole policy (DDP: rank 0; a sharded policy needs a gathering `WeightSource`).

    It must not share a process with an engine: both ends of a broadcast block.
    """

    def __init__(
        self,
        engines: Sequence[ActorHandle[Any]],
        source: nn.Module | WeightSource,
        *,
        backend: Literal["gloo", "nccl"],
        tensor_parallel_size: int,
        timeout_s: float,
        probe: Probe | None = None,
    ) -> None:
        """`engines` are handles of RolloutEngine actors. `timeout_s` bounds each wait for them (connecting, one call, one broadcast).

        With a `probe` (`policy_probe(policy)`) no engine confirms a version before its log-probabilities of it are the trainer's.
        """
        self._client = EngineClient(engines, tensor_parallel_size=tensor_parallel_size, timeout_s=timeout_s)
        self._source = ModuleWeights(source) if isinstance(source, nn.Module) else source
        self._backend = backend
        self._probe = probe
        self._sender: WeightSender | None = None

    def publish(self, version: int) -> SyncReport:
        """Bring every engine to the current weights and have it confirm `version`.

        Raises RolloutError when a second attempt over new connections failed too: some engine is gone or broken, and must be replaced.
        Engines that were reached are left refusing to generate.
        """
        try:
            return self._publish_once(version)
        except _CONNECTION_ERRORS as error:
            logger.warning(
                "Publishing policy version %d failed, trying once more over new connections: %s",
                version,
                _reason(error),
            )
        try:
            return self._publish_once(version)
        except _CONNECTION_ERRORS as error:
            raise RolloutError(
                f"Policy version {version} did not reach all {self._client.num_engines} engines, twice. "
                f"Recreate the engines that failed and publish through a new WeightPublisher. The last error was {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Leave the engines' group. The next publication connects again."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _publish_once(self, version: int) -> SyncReport:
        start_s = time.perf_counter()
        try:
            if self._sender is None:
                self._client.require_alive()
                self._sender = _connect(self._backend, self._client, self._source)
            sent = self._sender.send()
            loaded_s = self._confirm(version, sent.receiving)
        except BaseException:
            self.close()  # an engine that still waits for the rest of this update gets an error at once
            raise
        report = SyncReport(
            version, sent.num_bytes, loaded_s - start_s, time.perf_counter() - start_s, self._client.num_engines
        )
        logger.debug(
            "Policy version %d: %d bytes to %d engines in %.3f s",
            version,
            report.num_bytes,
            report.num_engines,
            report.seconds,
        )
        return report

    def _confirm(self, version: int, receiving: list[ObjectRef[Any]]) -> float:
        """The engines load the rest, and score the probe while the trainer scores it; then each compares and confirms. When all had loaded."""
        scoring = [] if self._probe is None else self._client.begin_score_probe(self._probe.token_ids)
        self._client.wait(receiving)  # an engine beside the trainer loads with the trainer's cores too
        loaded_s = time.perf_counter()
        trainer_logprobs = None if self._probe is None else self._probe.trainer_logprobs()
        self._client.wait(scoring)
        self._client.confirm_version(version, trainer_logprobs)
        return loaded_s


class EngineClient:
    """Calls all engines at once. The method names without `begin_` are those of vLLM's `VLLMWeightSyncClient` protocol."""

    def __init__(self, engines: Sequence[ActorHandle[Any]], *, tensor_parallel_size: int, timeout_s: float) -> None:
        assert engines, "a publisher needs at least one engine"
        self._engines = list(engines)
        self._tensor_parallel_size = tensor_parallel_size
        self.timeout_s = timeout_s

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    @property
    def world_size(self) -> int:
        """The trainer and every worker of every engine."""
        return 1 + self.num_engines * self._tensor_parallel_size

    def wait(self, calls: list[ObjectRef[Any]]) -> list[Any]:
        return ray.get(calls, timeout=self.timeout_s)

    def raise_first_failure(self, calls: list[ObjectRef[Any]]) -> None:
        """Raise the error of the first engine to answer; returns when none answers within a second."""
        answered, _ = ray.wait(calls, num_returns=1, timeout=1.0)
        ray.get(answered)

    def require_alive(self) -> None:
        """Raises RayError at once when an engine is dead, where joining a group with it would wait out the timeout."""
        self.wait([engine.policy_version.remote() for engine in self._engines])

    def can_share_memory(self) -> bool:
        """Whether all engines run beside this process."""
        return set(self.wait([engine.memory_namespace.remote() for engine in self._engines])) == {memory_namespace()}

    def begin_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> list[ObjectRef[Any]]:
        """Give each engine its own ranks: vLLM's own Ray client sends one `rank_offset` to all, and several engines then wait for each other."""
        return [
            engine.init_weight_transfer_engine.remote(
                {**init_info, "rank_offset": 1 + index * self._tensor_parallel_size}
            )
            for index, engine in enumerate(self._engines)
        ]

    def begin_receive_update(self, update_info: dict[str, Any]) -> list[ObjectRef[Any]]:
        return [engine.receive_update.remote(update_info) for engine in self._engines]

    def begin_score_probe(self, token_ids: list[int]) -> list[ObjectRef[Any]]:
        return [engine.score_probe.remote(token_ids) for engine in self._engines]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait(self.begin_init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        self.wait([engine.start_weight_update.remote() for engine in self._engines])

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict), "one update for all workers"
        self.wait([engine.update_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert weight_version is None, "versions are confirmed by confirm_version"
        self.wait([engine.finish_weight_update.remote() for engine in self._engines])

    def confirm_version(self, version: int, trainer_logprobs: list[float] | None = None) -> None:
        """Raises RolloutError unless every engine answers with `version`, and what an engine raises when its probe is not the trainer's."""
        versions = self.wait([engine.confirm_version.remote(version, trainer_logprobs) for engine in self._engines])
        if versions != [version] * self.num_engines:
            raise RolloutError(
                f"Engines confirmed policy versions {versions}, expected {version} from all {self.num_engines}."
            )


@dataclass(frozen=True)
class Sent:
    """What has left the trainer, and the engines' calls that are still loading it."""

    num_bytes: int
    """Of one copy."""
    receiving: list[ObjectRef[Any]]


class WeightSender(Protocol):
    """A connection to all engines that can send the weights again and again."""

    def send(self) -> Sent:
        """Send the weights to every engine."""
        ...

    def close(self) -> None: ...


class GlooSender:
    """Rank 0 of a gloo group that exists beside any default process group. Shares the weights in memory when all engines run beside it, or broadcasts them.

    A socket to one engine moves 3 to 4 GB/s and occupies both ends: on 2 cores an update of 100 M parameters takes as long again with it.
    """

    def __init__(self, client: EngineClient, source: WeightSource) -> None:
        self._client = client
        self._source = source
        self._shares_memory = client.can_share_memory()
        self._memory: SharedMemory | None = None
        address = ray.util.get_node_ip_address()
        store = host_store(address, client.world_size, client.timeout_s)
        init_info = {
            "master_address": address,
            "master_port": store.port,
            "world_size": client.world_size,
            "timeout_s": client.timeout_s,
        }
        joining = client.begin_init_weight_transfer_engine(init_info)
        self._group = open_group(store, 0, client.world_size, client.timeout_s)
        client.wait(joining)

    def send(self) -> Sent:
        specs = self._source.metadata()
        update_info = {
            "names": [spec.name for spec in specs],
            "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "shared_memory": None,
        }
        if self._shares_memory:
            if self._memory is None:
                self._memory = SharedMemory(num_shared_bytes(specs))
                if isinstance(self._source, ModuleWeights):
                    move_parameters(self._source, self._memory.buffer)
            update_info["shared_memory"] = self._memory.address
        receiving = self._client.begin_receive_update(update_info)
        try:
            if self._memory is not None:
                return Sent(share_weights(self._group, self._source, self._memory.buffer), receiving)
            return Sent(send_weights(self._group, self._source), receiving)
        except RuntimeError as error:
            logger.warning(
                "sending weights failed:\n%s", traceback.format_exc()
            )  # as text: a log record that is kept would hold the frames too
            reason = str(error)
        # Outside of the handler: an error that is raised in it holds gloo's, whose frames hold the group. The group would outlive `close`, and an engine
        # that is yet to come to this update would wait for it until the timeout.
        self._client.raise_first_failure(receiving)  # says more than gloo's "connection closed by peer"
        raise RolloutError(f"Sending the weights failed, and no engine says why: {reason}")

    def close(self) -> None:
        del self._group
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class NcclSender:
    """vLLM's own NCCL sender, by the same interface. Not run by us. NCCL itself knows no timeout and vLLM's sender sets none."""

    def __init__(self, client: EngineClient, source: WeightSource) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = ray.util.get_node_ip_address()
        info = NCCLTrainerInitInfo(
            master_address=address, master_port=free_port(""), world_size=client.world_size, rank=0
        )
        self._source = source
        vllm_source: Any = source  # vLLM's dense NCCL sender calls nothing but the two methods of our protocol
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=vllm_source)

    def send(self) -> Sent:
        self._trainer.send_weights()
        return Sent(sum(spec.num_bytes for spec in self._source.metadata()), receiving=[])

    def close(self) -> None:
        self._trainer.shutdown()


def _connect(backend: Literal["gloo", "nccl"], client: EngineClient, source: WeightSource) -> WeightSender:
    return NcclSender(client, source) if backend == "nccl" else GlooSender(client, source)


def _reason(error: Exception) -> str:
    """In one line: what an engine raised, without the remote traceback that Ray wraps around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"
