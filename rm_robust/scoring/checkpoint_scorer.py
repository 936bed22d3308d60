"""Score with a committed checkpoint, in this process or in several Ray workers, with the same replies as an endpoint.

score(inputs) ─ inputs[i::n] ─► worker i, which holds the whole checkpoint ─► replies, back in order

The cases of a call are dealt out, so that every worker gets short and long ones.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from rm_robust.errors import ConfigError, DataError, RefusedInputError, RmRobustError, ScoringError
from rm_robust.models.scorer import RewardScorer
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult

ON_A_GPU = "Start it on a machine with a GPU (a Ray job: `ray job submit --entrypoint-num-gpus=1 …`)"
MAX_RESTARTS = 3
"""Restarts of a worker that died. Each restart repeats the call in which it died."""


def require_device(device: str, setting: str, *, fix: str) -> None:
    """Raise ConfigError when this process cannot use `device`; `setting` is the setting as the message names it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        host = socket.gethostname()
        reason = (
            f"{host} has no CUDA"
            if device.startswith("cuda") and not torch.cuda.is_available()
            else str(error).strip().splitlines()[0]
        )
        raise ConfigError(
            f"{setting} cannot be used: this process, on {host}, does the scoring, and {reason}. {fix}"
        ) from error


class CheckpointScorer:
    """A Scorer in this process. It computes in float32, so that rounding makes no ties."""

    def __init__(
        self, checkpoint_dir: Path, *, device: str, max_length_tokens: int | None, max_tokens_per_batch: int
    ) -> None:
        """Load the checkpoint. Raises CheckpointError when it is not a reward model of this project."""
        self._scorer = RewardScorer.load(
            checkpoint_dir, device=device, dtype="float32", max_length_tokens=max_length_tokens
        )
        self._max_tokens_per_batch = max_tokens_per_batch

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Score the inputs. Raises RefusedInputError when one is too long or invalid, or its score is not finite."""
        chat = self._scorer.chat
        try:
            groups = [chat.token_group(item.prompt, item.completions) for item in inputs]
            scores = self._scorer.score_groups(groups, max_tokens_per_batch=self._max_tokens_per_batch)
        except (DataError, ScoringError) as error:
            raise RefusedInputError(str(error)) from error
        return ScoreReply(
            model=self._scorer.model_name,
            checkpoint=self._scorer.checkpoint_id,
            template=chat.template_sha256,
            results=[ScoreResult(scores=input_scores) for input_scores in scores],
        )


class _Worker:
    """An actor that loads its checkpoint in its first call.

    What is wrong with the checkpoint is then an error of that call, and not of an actor that died.
    """

    def __init__(self, checkpoint_dir: Path, settings: dict[str, Any], num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._checkpoint_dir, self._settings = checkpoint_dir, settings
        self._scorer: CheckpointScorer | None = None

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        if self._scorer is None:
            self._scorer = CheckpointScorer(self._checkpoint_dir, **self._settings)
        return self._scorer.score(inputs)


class ShardedScorer:
    """A Scorer in several Ray workers.

    The caller is connected to Ray, and the checkpoint is on storage that every node can read.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        *,
        num_workers: int,
        num_cpus: float,
        device: str,
        max_length_tokens: int | None,
        max_tokens_per_batch: int,
    ) -> None:
        """Start the workers. Each has `num_cpus` CPUs and as many threads; on a GPU each takes one GPU."""
        settings = {
            "device": device,
            "max_length_tokens": max_length_tokens,
            "max_tokens_per_batch": max_tokens_per_batch,
        }
        worker: Any = ray.remote(_Worker)
        worker = worker.options(
            num_cpus=num_cpus,
            num_gpus=0 if device == "cpu" else 1,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        self._workers: list[ActorHandle[Any]] = [
            worker.remote(checkpoint_dir.absolute(), settings, max(1, int(num_cpus))) for _ in range(num_workers)
        ]

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Score the inputs, dealt out to the workers.

        Raises what CheckpointScorer raises, also when it loads, and ScoringError when a worker is lost for good or two
        workers have loaded different checkpoints.
        """
        num_parts = min(len(inputs), len(self._workers))
        calls = [worker.score.remote(inputs[part::num_parts]) for part, worker in enumerate(self._workers[:num_parts])]
        try:
            replies: list[ScoreReply] = ray.get(calls)
        except RayTaskError as error:
            if isinstance(error.cause, RmRobustError):
                raise error.cause from None  # without the worker's traceback in its text
            raise
        except RayError as error:
            raise ScoringError(f"A scoring worker was lost: {error}") from error
        checkpoints = sorted({reply.checkpoint for reply in replies})
        if len(checkpoints) > 1:
            raise ScoringError(
                f"The workers have loaded different checkpoints: {', '.join(checkpoints)}. "
                "Do not write to a checkpoint while it is used."
            )
        results = [replies[index % num_parts].results[index // num_parts] for index in range(len(inputs))]
        return replies[0].model_copy(update={"results": results})
