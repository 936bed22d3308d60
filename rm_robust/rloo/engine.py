"""One vLLM engine (0.32) that samples completions under one confirmed policy version; the caller makes it a Ray actor.

    no weights ─update─► updating ─finished─► score_probe ─► confirm_version(v) ─► generates as version v ─► updating …
                            └─ failed, or the probe's log-probabilities differ from the trainer's:
                               refuses to generate until an update succeeds

Prompts and completions are token ids. An engine refuses to generate until its first confirmed update, also after a
restart: the weights in `model_dir` have the right shapes, but their version is unknown. vllm is imported when the
engine is built, so that drivers and trainers can import this file.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rm_robust.cluster.environment import cpu_environment, listen_where_ray_does
from rm_robust.cluster.log_lines import start_logging
from rm_robust.errors import ConfigError, RolloutError
from rm_robust.rloo.rollout import Completion, GenerationRequest, PromptCompletions
from rm_robust.rloo.weights.shared_memory import memory_namespace
from rm_robust.runs import files as run_files

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest allowed difference (nats) between the engine's and the trainer's log-probability of a probe token.

The keys are dtypes of the engine; the trainer computes in float32. Measured with the right weights: 2e-5 (float32, up
to 100 M parameters) and 0.14 (bfloat16, 19 M parameters, 4000 tokens).
"""


class _Update(Enum):
    """The state of the engine's latest weight update."""

    NONE = "no update yet"
    STARTED = "started"
    RECEIVED = "received"
    FINISHED = "finished"
    FAILED = "failed"


class RolloutEngine:
    """Samples from the policy.

    All methods block. Weight updates and generation never overlap, because a Ray actor runs one call at a time.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: Literal["float32", "bfloat16"],
        max_model_len: int,
        seed: int,
        device: Literal["cpu", "cuda"],
        kv_cache_memory_bytes: int,
        max_num_seqs: int,
        weight_transfer_backend: Literal["gloo", "nccl"],
        tensor_parallel_size: int,
    ) -> None:
        """Load the model in `model_dir`, a Hugging Face causal LM whose tokenizer is not read.

        `max_model_len` bounds prompt plus completion, in tokens. `kv_cache_memory_bytes` is used on CPU only; on a GPU
        vLLM takes its usual share of the memory. Raises ConfigError for settings that vLLM cannot run together, and on
        a CPU actor without `cpu_environment`.
        """
        start_logging(force=True)
        listen_where_ray_does()
        run_files.fetch(Path(model_dir))
        _check_settings(model_dir, device, tensor_parallel_size, weight_transfer_backend)
        for name in ("torch._library.triton", "vllm.triton_utils"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they warn that a machine without GPU has no triton
        from vllm import LLM

        cpu_settings: dict[str, Any] = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "enable_chunked_prefill": False,  # vLLM 0.32 crashes when it splits the prompt of a seeded request on CPU
        }
        self._llm = LLM(
            model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=seed,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            weight_transfer_config={"backend": weight_transfer_backend},
            skip_tokenizer_init=True,
            generation_config="vllm",  # ignore the checkpoint's sampling defaults
            logprobs_mode="processed_logprobs",  # those of the sampling distribution: after temperature and top_p
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            **(cpu_settings if device == "cpu" else {}),
        )
        # vLLM has given its logger handlers while it started; without them our handler writes its later lines.
        vllm_logger = logging.getLogger("vllm")
        vllm_logger.handlers.clear()
        vllm_logger.propagate = True
        self._max_model_len = max_model_len
        self._probe_tolerance = PROBE_TOLERANCE[dtype]
        self._update = _Update.NONE
        self._probe_logprobs: list[float] | None = None
        self._policy_version: int | None = None
        self._has_confirmed = False

    def generate(self, requests: list[GenerationRequest]) -> Iterator[list[tuple[int, PromptCompletions]]]:
        """Sample completions of each prompt and yield (position in `requests`, completions) as prompts finish.

        Each item holds the prompts that one decoding step finished. `sampler_logprobs` belong to the sampling
        distribution, after temperature and top_p. A completion ends with one of the request's stop tokens, which is
        part of it, or it is truncated; no other token ends it. Raises RolloutError when the engine has no confirmed
        weights, a request does not fit into the context, or an answer is incomplete. Closing the generator early aborts
        its requests in the engine.
        """
        from vllm import TokensPrompt

        version = self._require_version()
        self._check_fit([(request.prompt_ids, request.max_new_tokens) for request in requests])
        engine = self._llm.llm_engine
        unfinished = {str(position) for position in range(len(requests))}
        try:
            for position, request in enumerate(requests):
                engine.add_request(
                    str(position), TokensPrompt(prompt_token_ids=request.prompt_ids), _sampling_params(request)
                )
            while engine.has_unfinished_requests():
                finished: list[Any] = [output for output in engine.step() if output.finished]
                unfinished -= {output.request_id for output in finished}
                if finished:
                    yield [
                        (int(output.request_id), _prompt_completions(requests[int(output.request_id)], output, version))
                        for output in finished
                    ]
        finally:
            if unfinished:
                engine.abort_request(sorted(unfinished))

    def greedy(self, prompt_ids_list: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, exactly `max_new_tokens` tokens: no token stops it."""
        from vllm import SamplingParams

        self._require_version()
        self._check_fit([(prompt_ids, max_new_tokens) for prompt_ids in prompt_ids_list])
        params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False)
        outputs = self._run(prompt_ids_list, [params] * len(prompt_ids_list))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def score_tokens(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        """Return the log-probability (nats, at temperature 1) of each token of a given completion.

        The prefix cache is not read.
        """
        self._require_version()
        return self._score(prompt_ids, completion_ids)

    def policy_version(self) -> int | None:
        """Return the version that completions are sampled with; None while the engine refuses to generate."""
        return self._policy_version

    def memory_namespace(self) -> str:
        """Return the engine's memory namespace: a trainer with an equal one can share memory with the engine."""
        return memory_namespace()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's group; blocks until all members have joined."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def receive_update(self, update_info: dict[str, Any]) -> None:
        """Do a whole update in one call: start it, receive and load the trainer's weights, and put them to use.

        Raises what the three parts raise.
        """
        self.start_weight_update()
        self.update_weights(update_info)
        self.finish_weight_update()

    def start_weight_update(self) -> None:
        """Start an update; the engine refuses to generate from now until `confirm_version`."""
        self._policy_version = None
        self._probe_logprobs = None
        is_open = self._update in (_Update.STARTED, _Update.RECEIVED)
        self._update = _Update.FAILED
        if is_open:  # the trainer failed half-way; vLLM refuses a second start while an update is open
            self._llm.finish_weight_update()
        self._llm.start_weight_update()
        self._update = _Update.STARTED

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load the weights that the trainer sends. After a failure the trainer must connect again."""
        self._update = _Update.FAILED
        try:
            self._llm.update_weights({"update_info": update_info})
        except BaseException:  # leaving the group tells the trainer, which may be waiting in a broadcast
            self._llm.shutdown_weight_transfer_engine()
            raise
        self._update = _Update.RECEIVED

    def finish_weight_update(self) -> None:
        """Put the received weights to use and clear the prefix cache. If this fails, the actor must be recreated."""
        self._update = _Update.FAILED
        self._llm.finish_weight_update()
        if not self._llm.reset_prefix_cache():
            raise RolloutError(
                "vLLM did not reset its prefix cache after a weight update: a request must still be running."
            )
        self._update = _Update.FINISHED

    def score_probe(self, token_ids: list[int]) -> None:
        """Compute the log-probabilities of a fixed text with the weights of the update that just finished.

        `confirm_version` compares them with the trainer's.
        """
        self._require_finished("score a probe")
        self._probe_logprobs = self._score(token_ids[:1], token_ids[1:])

    def confirm_version(self, version: int, trainer_logprobs: list[float] | None = None) -> int:
        """Give the weights of the update that just finished their version, and allow generation again.

        `trainer_logprobs` are the trainer's log-probabilities of the probe's tokens after the first; None confirms
        without a probe. Raises RolloutError when the engine's differ from them by more than PROBE_TOLERANCE: the engine
        then computes with other weights than those that it received.
        """
        self._require_finished(f"confirm policy version {version}")
        if trainer_logprobs is not None:
            self._compare_probe(version, trainer_logprobs)
        self._llm.update_weight_version(str(version))
        self._policy_version, self._has_confirmed = version, True
        return version

    def shutdown(self) -> None:
        """Stop vLLM cleanly; call it before `ray.kill`."""
        self._policy_version = None
        self._llm.llm_engine.engine_core.shutdown()

    def _score(self, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
        from vllm import SamplingParams

        token_ids = prompt_ids + completion_ids
        self._check_fit([(token_ids, 1)])
        # vLLM applies no temperature to prompt_logprobs
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        positions = self._run([token_ids], [params])[0].prompt_logprobs or []
        logprobs = _logprobs_of(completion_ids, positions[len(prompt_ids) :])
        if not all(map(math.isfinite, logprobs)):
            raise RolloutError(
                f"vLLM returned {sum(map(math.isfinite, logprobs))} finite log-probabilities "
                f"for {len(completion_ids)} tokens."
            )
        return logprobs

    def _compare_probe(self, version: int, trainer_logprobs: list[float]) -> None:
        self._update = _Update.FAILED
        engine_logprobs = self._probe_logprobs or []
        if len(engine_logprobs) != len(trainer_logprobs):
            raise RolloutError(
                f"Policy version {version}: the trainer has {len(trainer_logprobs)} probe log-probabilities, "
                f"the engine has {len(engine_logprobs)}."
            )
        differences = [abs(engine - trainer) for engine, trainer in zip(engine_logprobs, trainer_logprobs, strict=True)]
        if not all(difference <= self._probe_tolerance for difference in differences):  # false for NaN too
            raise RolloutError(
                f"This engine does not compute with policy version {version}: its log-probabilities of the probe "
                f"differ from the trainer's by up to {max(differences):.3g} nats; {self._probe_tolerance} are allowed. "
                f"The bytes arrived. {self._likely_cause()}"
            )
        self._update = _Update.FINISHED

    def _likely_cause(self) -> str:
        if self._has_confirmed:
            return (
                "The engine computed earlier versions right, so a layer still uses older weights. Recreate the engine."
            )
        return (
            "It is the engine's first version: either vLLM computes this model otherwise than transformers (another "
            "head, attention or number format), and another vLLM version or model family is needed, or a layer still "
            "uses the weights that the engine loaded at its start."
        )

    def _require_finished(self, purpose: str) -> None:
        if self._update is not _Update.FINISHED:
            raise RolloutError(
                f"Cannot {purpose}: the latest weight update of this engine is '{self._update.value}', not finished."
            )

    def _require_version(self) -> int:
        if self._policy_version is None:
            raise RolloutError(
                f"This engine has no confirmed weights (latest weight update: {self._update.value}) and refuses to "
                "generate. Publish the policy's weights to it first."
            )
        return self._policy_version

    def _check_fit(self, lengths: list[tuple[list[int], int]]) -> None:
        for prompt_ids, max_new_tokens in lengths:
            if not prompt_ids or max_new_tokens < 1 or len(prompt_ids) + max_new_tokens > self._max_model_len:
                raise RolloutError(
                    f"A prompt of {len(prompt_ids)} tokens with {max_new_tokens} new tokens does not fit the engine's "
                    f"{self._max_model_len} tokens (at least 1 of each). Shorten the prompt or raise the context "
                    "length."
                )

    def _run(self, prompts: list[list[int]], params: list["SamplingParams"]) -> list["RequestOutput"]:
        from vllm import TokensPrompt

        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt_ids) for prompt_ids in prompts], params, use_tqdm=False
        )
        if [output.prompt_token_ids for output in outputs] != prompts:
            raise RolloutError(
                f"vLLM answered {len(outputs)} requests, but not the {len(prompts)} prompts that it got, in order."
            )
        return outputs


def _check_settings(model_dir: str, device: str, tensor_parallel_size: int, weight_transfer_backend: str) -> None:
    if not (Path(model_dir) / "config.json").is_file():
        raise ConfigError(
            f"{model_dir} holds no config.json. Give the directory of a Hugging Face causal language model."
        )
    if device == "cuda":
        return
    if tensor_parallel_size != 1 or weight_transfer_backend != "gloo":
        raise ConfigError(
            "On CPU an engine needs tensor_parallel_size = 1 and weight_transfer_backend = 'gloo', "
            f"got {tensor_parallel_size} and '{weight_transfer_backend}'."
        )
    missing = [name for name in cpu_environment(1) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set. Create CPU engine actors with "
            "runtime_env={'env_vars': cpu_environment(num_threads)}."
        )


def _sampling_params(request: GenerationRequest) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.num_completions,
        output_kind=RequestOutputKind.FINAL_ONLY,
        max_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=True,  # ignores the EOS of the model's config: the request names every token that stops
        seed=request.seed,
        logprobs=0,  # only the log-probability of the sampled token
        detokenize=False,
    )


def _prompt_completions(request: GenerationRequest, output: "RequestOutput", version: int) -> PromptCompletions:
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    if [sample.index for sample in samples] != list(
        range(request.num_completions)
    ) or output.prompt_token_ids != request.prompt_ids:
        raise RolloutError(
            f"vLLM returned {len(samples)} completions of prompt {request.prompt_id}, "
            f"asked for {request.num_completions}."
        )
    return PromptCompletions(
        request.prompt_id, request.prompt_ids, [_completion(request, sample, version) for sample in samples]
    )


def _completion(request: GenerationRequest, sample: "CompletionOutput", version: int) -> Completion:
    """Check and convert one sample.

    Raises RolloutError unless every token has a finite log-probability and comes from `version`.
    """
    label = f"completion {sample.index} of prompt {request.prompt_id}"
    token_ids = list(sample.token_ids)
    if sample.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended {label} with '{sample.finish_reason}' after {len(token_ids)} tokens.")
    spans = [(span.version, span.start, span.end) for span in sample.weight_versions or []]
    if spans != [(str(version), 0, len(token_ids))]:
        raise RolloutError(
            f"{label} was sampled by weight versions {spans}; expected only {version} for all {len(token_ids)} tokens."
        )
    logprobs = _logprobs_of(token_ids, sample.logprobs or [])
    if not token_ids or not all(map(math.isfinite, logprobs)):
        raise RolloutError(
            f"{label} has {len(token_ids)} tokens but {sum(map(math.isfinite, logprobs))} finite log-probabilities."
        )
    return Completion(token_ids, logprobs, is_truncated=sample.finish_reason == "length", policy_version=version)


def _logprobs_of(token_ids: list[int], positions: "Sequence[dict[int, Logprob] | None]") -> list[float]:
    """Return the log-probability of each token; NaN where vLLM gave none."""
    if len(positions) != len(token_ids):
        return [math.nan] * len(token_ids)
    return [
        position[token_id].logprob if position else math.nan
        for token_id, position in zip(token_ids, positions, strict=True)
    ]
