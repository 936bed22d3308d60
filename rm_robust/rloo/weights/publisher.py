"""The trainer's end of weight updates: send the policy's weights to every vLLM engine, and have each confirm them.

    policy ─WeightPublisher.publish(v)─┬─► every engine loads the weights, checks the bytes, scores the probe ─┐
                                       └─► the trainer scores the probe itself at the same time ───────────────┤
                                                                                compared, v confirmed ◄────────┘

After any failure the connections are closed and the update is tried once more over new ones; a second failure raises
RolloutError. The backend `gloo` (CPU) is our own and imports nothing from vLLM here: vLLM's trainer factory would cost
a trainer 2.4 s and 120 MB. The backend `nccl` (GPUs) is vLLM's own sender; we have never run it (there was no GPU).
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
from rm_robust.rloo.weights.broadcast import ModuleWeights, TrainerWeights, host_store, open_group, send_weights
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
"""The errors of a lost engine or connection: Ray's, gloo's (RuntimeError), and an engine's refusal (RolloutError)."""


@dataclass(frozen=True)
class SyncReport:
    """The report of one successful weight update, confirmed by `num_engines` engines."""

    version: int
    num_bytes: int
    """Number of bytes in one copy of the weights as sent."""
    load_seconds: float
    """Seconds until every engine had loaded the weights and checked their bytes."""
    seconds: float
    """Seconds until every engine had confirmed the version, the probe included."""
    num_engines: int


def register_gloo_backend() -> None:
    """Make `weight_transfer_config={"backend": "gloo"}` known to vLLM.

    vLLM calls this entry point in each of its processes.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # already registered: vLLM may load its plugins more than once in a process
        WeightTransferEngineFactory.register_engine(
            "gloo", "rm_robust.rloo.weights.vllm_transfer", "GlooWeightTransferEngine"
        )


class WeightPublisher:
    """Publishes the policy's weights from the trainer process that has them all, rank 0.

    A sharded policy must be gathered first (`NamedWeights`). The process must not hold an engine too, because both ends
    of a broadcast block.
    """

    def __init__(
        self,
        engines: Sequence[ActorHandle[Any]],
        weights: nn.Module | TrainerWeights,
        *,
        backend: Literal["gloo", "nccl"],
        tensor_parallel_size: int,
        timeout_s: float,
        probe: Probe | None = None,
    ) -> None:
        """Prepare to publish to `engines`, handles of RolloutEngine actors; the first update connects to them.

        `timeout_s` bounds each wait for them (connecting, one call, one broadcast). With a `probe`
        (`policy_probe(policy)`) an engine confirms a version only if its log-probabilities of the probe are the
        trainer's.
        """
        self._client = EngineClient(engines, tensor_parallel_size=tensor_parallel_size, timeout_s=timeout_s)
        self._weights = ModuleWeights(weights) if isinstance(weights, nn.Module) else weights
        self._backend = backend
        self._probe = probe
        self._sender: WeightSender | None = None

    def publish(self, version: int) -> SyncReport:
        """Bring every engine to the current weights and have it confirm `version`.

        Raises RolloutError when a second attempt over new connections fails too: an engine is gone or broken, and must
        be replaced. The engines that were reached then refuse to generate.
        """
        try:
            return self._publish_once(version)
        except _CONNECTION_ERRORS as error:
            logger.warning(
                "Publishing policy version %d failed; it is tried once more over new connections: %s",
                version,
                _reason(error),
            )
        try:
            return self._publish_once(version)
        except _CONNECTION_ERRORS as error:
            raise RolloutError(
                f"Policy version {version} did not reach all {self._client.num_engines} engines, twice. "
                "Recreate the engines that failed and publish through a new WeightPublisher. "
                f"The last error was {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Leave the engines' group; the next `publish` connects again."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _publish_once(self, version: int) -> SyncReport:
        start_s = time.perf_counter()
        try:
            if self._sender is None:
                self._client.require_alive()
                self._sender = _connect(self._backend, self._client, self._weights)
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
        """Wait until all engines have loaded, have engines and trainer score the probe, and have `version` confirmed.

        Returns the time (`time.perf_counter`) at which all engines had loaded the weights.
        """
        scoring = [] if self._probe is None else self._client.begin_score_probe(self._probe.token_ids)
        self._client.wait(receiving)  # before the trainer computes: an engine on its machine loads with its cores too
        loaded_s = time.perf_counter()
        trainer_logprobs = None if self._probe is None else self._probe.trainer_logprobs()
        self._client.wait(scoring)
        self._client.confirm_version(version, trainer_logprobs)
        return loaded_s


class EngineClient:
    """Calls all engines at once. Methods without `begin_` have the names of vLLM's `VLLMWeightSyncClient` protocol."""

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
        """Return the number of processes in the group: the trainer and every worker of every engine."""
        return 1 + self.num_engines * self._tensor_parallel_size

    def wait(self, calls: list[ObjectRef[Any]]) -> list[Any]:
        """Return the engines' answers; raise what one of them raises."""
        return ray.get(calls, timeout=self.timeout_s)

    def raise_first_failure(self, calls: list[ObjectRef[Any]]) -> None:
        """Raise the error of the first engine that answers; return when none answers within a second."""
        answered, _ = ray.wait(calls, num_returns=1, timeout=1.0)
        ray.get(answered)

    def require_alive(self) -> None:
        """Raise RayError at once when an engine is dead; joining a group with it would fail only after the timeout."""
        self.wait([engine.policy_version.remote() for engine in self._engines])

    def can_share_memory(self) -> bool:
        """Return whether all engines run on this machine, where they can open this process's memory."""
        return set(self.wait([engine.memory_namespace.remote() for engine in self._engines])) == {memory_namespace()}

    def begin_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> list[ObjectRef[Any]]:
        """Let the engines join the group, each with ranks of its own.

        vLLM's own Ray client sends one `rank_offset` to all, and several engines then wait for each other forever.
        """
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
        """Have every engine confirm `version`.

        Raises RolloutError unless every engine answers with `version`, and what an engine raises when its probe differs
        from the trainer's.
        """
        versions = self.wait([engine.confirm_version.remote(version, trainer_logprobs) for engine in self._engines])
        if versions != [version] * self.num_engines:
            raise RolloutError(
                f"Engines confirmed policy versions {versions}, expected {version} from all {self.num_engines}."
            )


@dataclass(frozen=True)
class Sent:
    """The bytes that have left the trainer, and the calls of engines that are still loading them."""

    num_bytes: int
    """Number of bytes in one copy of the weights."""
    receiving: list[ObjectRef[Any]]


class WeightSender(Protocol):
    """A connection to all engines that can send the weights any number of times."""

    def send(self) -> Sent:
        """Send the weights to every engine."""
        ...

    def close(self) -> None: ...


class GlooSender:
    """Rank 0 of a gloo group, which exists beside any default process group.

    It shares the weights in memory when all engines run on the trainer's machine, and broadcasts them otherwise. A
    socket to one engine moves 3 to 4 GB/s and occupies both ends: on 2 cores, an update of 100 M parameters takes twice
    as long through it.
    """

    def __init__(self, client: EngineClient, weights: TrainerWeights) -> None:
        self._client = client
        self._weights = weights
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
        specs = self._weights.metadata()
        update_info = {
            "names": [spec.name for spec in specs],
            "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "shared_memory": None,
        }
        if self._shares_memory:
            if self._memory is None:
                self._memory = SharedMemory(num_shared_bytes(specs))
                if isinstance(self._weights, ModuleWeights):
                    move_parameters(self._weights, self._memory.buffer)
            update_info["shared_memory"] = self._memory.address
        receiving = self._client.begin_receive_update(update_info)
        try:
            if self._memory is not None:
                return Sent(share_weights(self._group, self._weights, self._memory.buffer), receiving)
            return Sent(send_weights(self._group, self._weights), receiving)
        except RuntimeError as error:
            # The traceback is logged as text, because a log record that is kept would keep the frames alive.
            logger.warning("sending weights failed:\n%s", traceback.format_exc())
            reason = str(error)
        # Raise outside of the handler: an error raised in it refers to gloo's error, whose frames refer to the group.
        # The group would outlive `close`, and an engine that joins this update late would wait until the timeout.
        self._client.raise_first_failure(receiving)  # says more than gloo's "connection closed by peer"
        raise RolloutError(f"Sending the weights failed, and no engine says why: {reason}")

    def close(self) -> None:
        del self._group
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class NcclSender:
    """vLLM's own NCCL sender behind the same interface; we have never run it.

    NCCL itself has no timeout, and vLLM's sender sets none.
    """

    def __init__(self, client: EngineClient, weights: TrainerWeights) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = ray.util.get_node_ip_address()
        info = NCCLTrainerInitInfo(
            master_address=address, master_port=free_port(""), world_size=client.world_size, rank=0
        )
        self._weights = weights
        vllm_source: Any = weights  # vLLM's dense NCCL sender calls nothing but the two methods of our protocol
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=vllm_source)

    def send(self) -> Sent:
        self._trainer.send_weights()
        return Sent(sum(spec.num_bytes for spec in self._weights.metadata()), receiving=[])

    def close(self) -> None:
        self._trainer.shutdown()


def _connect(backend: Literal["gloo", "nccl"], client: EngineClient, weights: TrainerWeights) -> WeightSender:
    return NcclSender(client, weights) if backend == "nccl" else GlooSender(client, weights)


def _reason(error: Exception) -> str:
    """Return in one line what an engine raised, without the remote traceback that Ray puts around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"
