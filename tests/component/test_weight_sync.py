"""Weight updates between real Ray actors: a transformers policy in a trainer actor and real vLLM engines, over gloo."""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayTaskError
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rm_robust.cluster.environment import INTERFACE_VARIABLE, cpu_environment
from rm_robust.cluster.log_lines import FORMAT_VARIABLE, environment_of
from rm_robust.errors import RolloutError
from rm_robust.models.packing import choose_layout
from rm_robust.models.policy import PackedPolicy, load_policy
from rm_robust.rloo.engine import PROBE_TOLERANCE, RolloutEngine
from rm_robust.rloo.rollout import GenerationRequest, PromptCompletions
from rm_robust.rloo.weights.broadcast import ModuleWeights, ParameterSpec
from rm_robust.rloo.weights.probe import policy_probe
from rm_robust.rloo.weights.publisher import EngineClient, GlooSender, SyncReport, WeightPublisher
from tests.support.tiny_models import VOCABULARY_SIZE, save_qwen2, save_tiny_qwen2, sized_qwen2_config

pytestmark = pytest.mark.timeout(240)
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

MAX_MODEL_LEN = 512
KV_BLOCK_TOKENS = 128
SYNC_TIMEOUT_S = 60.0
STOP_TOKEN_ID = 1
LOGPROB_TOLERANCE = 1e-4


def prompt_ids(num_tokens: int, *, seed: int) -> list[int]:
    return torch.randint(2, VOCABULARY_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt_ids(3, seed=1), prompt_ids(17, seed=2), prompt_ids(KV_BLOCK_TOKENS + 72, seed=3)]
"""Prompts of which the last is longer than a KV block.

Only such a prompt leaves something in the prefix cache that could be wrong for the next version.
"""


class TransformersTrainer:
    """Holds a policy in plain transformers that can be changed and published.

    It shares its weights with a policy like that of RLOO's trainer, which computes the probe.
    """

    def __init__(self, model_dir: str, engines: list[ActorHandle]) -> None:
        self.model = load_policy(model_dir, dtype=torch.float32)
        layout = choose_layout(self.model.config, self.model.device)
        policy = PackedPolicy(load_policy(model_dir, dtype=torch.float32), layout, temperature=0.7)
        # share the Parameter objects, because publishing moves their memory
        for name, parameter in policy.model.named_parameters():
            layer, _, parameter_name = name.rpartition(".")
            setattr(self.model.get_submodule(layer), parameter_name, parameter)
        self.model.tie_weights()
        self.engines = engines
        self.probe = policy_probe(policy)
        self.publisher = WeightPublisher(
            engines, policy.model, backend="gloo", tensor_parallel_size=1, timeout_s=SYNC_TIMEOUT_S, probe=self.probe
        )

    @torch.no_grad()
    def change_weights(self, *, seed: int, scale: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)

    def probe_logprobs(self) -> tuple[list[int], list[float]]:
        return self.probe.token_ids, self.probe.trainer_logprobs()

    def publish(self, version: int) -> SyncReport:
        return self.publisher.publish(version)

    def publish_without_probe(self, version: int) -> SyncReport:
        return publisher_of(self.engines, ModuleWeights(self.model)).publish(version)

    def publish_over_sockets(self, version: int) -> SyncReport:
        """Publish as from another machine."""
        from rm_robust.rloo.weights import publisher

        shares_memory = publisher.EngineClient.can_share_memory
        publisher.EngineClient.can_share_memory = lambda self: False
        try:
            self.publisher.close()
            return self.publisher.publish(version)
        finally:
            publisher.EngineClient.can_share_memory = shares_memory
            self.publisher.close()

    def publish_only(self, names: list[str], *, version: int) -> None:
        publisher_of(self.engines, SomeWeights(self.model, names)).publish(version)

    def send_and_vanish(self) -> None:
        """Act like a trainer that is killed after its weights have arrived."""
        client = EngineClient(self.engines, tensor_parallel_size=1, timeout_s=SYNC_TIMEOUT_S)
        client.wait(GlooSender(client, ModuleWeights(self.model)).send().receiving)

    def publish_foreign(self, *, version: int) -> None:
        publisher_of(self.engines, ForeignWeights(self.model)).publish(version)

    def publish_and_break(self, *, version: int) -> None:
        publisher_of(self.engines, BreakingWeights(self.model)).publish(version)

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return [self._greedy_one(prompt, max_new_tokens) for prompt in prompts]

    @torch.no_grad()
    def logprobs(self, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
        logprobs_TV = (self.model(torch.tensor([prompt + completion])).logits[0] / temperature).log_softmax(-1)
        return [logprobs_TV[len(prompt) - 1 + index, token].item() for index, token in enumerate(completion)]

    def _greedy_one(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        token_ids = list(prompt)
        for _ in range(max_new_tokens):
            token_ids.append(int(self.model(torch.tensor([token_ids])).logits[0, -1].argmax()))
        return token_ids[len(prompt) :]


class SomeWeights(ModuleWeights):
    """Announces and yields only some of the parameters."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__(module)
        self._names = names

    def metadata(self) -> list[ParameterSpec]:
        return [spec for spec in super().metadata() if spec.name in self._names]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in super().__iter__() if name in self._names)


class BreakingWeights(ModuleWeights):
    """Fails while its parameters are read, like a trainer that runs out of memory."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield next(super().__iter__())
        raise MemoryError("the trainer broke while it was sending")


class ForeignWeights(ModuleWeights):
    """Yields parameters that no engine's model has."""

    def metadata(self) -> list[ParameterSpec]:
        return [ParameterSpec(f"foreign.{spec.name}", spec.dtype, spec.shape) for spec in super().metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((f"foreign.{name}", tensor) for name, tensor in super().__iter__())


def publisher_of(engines: list[ActorHandle], weights: ModuleWeights) -> WeightPublisher:
    return WeightPublisher(engines, weights, backend="gloo", tensor_parallel_size=1, timeout_s=SYNC_TIMEOUT_S)


@dataclass(frozen=True)
class ConnectedTrainer:
    """A trainer and its engines after it has published version 0, and the engines' refusals from before that."""

    trainer: ActorHandle
    engines: list[ActorHandle]
    refusals: list[str]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    # the folder is short, because socket paths must be
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="rm") as temp_dir:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=temp_dir)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def engines_by_model(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, list[ActorHandle]]]]:
    """Start two engines of a tied model and one of an untied model together."""
    tied_dir = save_tiny_qwen2(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    untied_dir = save_tiny_qwen2(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)
    tied_engines = [start_engine(tied_dir, max_restarts=restarts) for restarts in (0, 1)]
    untied_engines = [
        start_engine(untied_dir, environment=environment_of("mine", "rloo", "engine 1") | {FORMAT_VARIABLE: "json"})
    ]
    yield {"tied": (tied_dir, tied_engines), "untied": (untied_dir, untied_engines)}
    for engine in tied_engines[:1] + untied_engines:  # the second tied engine is killed by the last test
        ray.get(engine.shutdown.remote(), timeout=30)


@pytest.fixture(scope="module")
def tied(engines_by_model: dict[str, tuple[Path, list[ActorHandle]]]) -> ConnectedTrainer:
    return connect_trainer(*engines_by_model["tied"])


@pytest.fixture(scope="module")
def untied(engines_by_model: dict[str, tuple[Path, list[ActorHandle]]]) -> ConnectedTrainer:
    return connect_trainer(*engines_by_model["untied"])


def start_engine(
    model_dir: Path, *, max_restarts: int = 0, dtype: str = "float32", environment: dict[str, str] | None = None
) -> ActorHandle:
    return (
        ray.remote(RolloutEngine)
        .options(
            num_cpus=1, max_restarts=max_restarts, runtime_env={"env_vars": cpu_environment(1) | (environment or {})}
        )
        .remote(
            model_dir=str(model_dir),
            dtype=dtype,
            max_model_len=MAX_MODEL_LEN,
            seed=0,
            device="cpu",
            kv_cache_memory_bytes=64 * 2**20,
            max_num_seqs=128,
            weight_transfer_backend="gloo",
            tensor_parallel_size=1,
        )
    )


def connect_trainer(model_dir: Path, engines: list[ActorHandle]) -> ConnectedTrainer:
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    trainer = (
        ray.remote(TransformersTrainer)
        .options(num_cpus=1, runtime_env={"env_vars": environment})
        .remote(str(model_dir), engines)
    )
    refusals = []
    for engine in engines:
        with pytest.raises(RayTaskError) as refusal:
            sample(engine, requests_of([PROMPTS[0]]))
        refusals.append(str(refusal.value))
    report = ray.get(trainer.publish.remote(0))
    assert report.num_engines == len(engines)
    return ConnectedTrainer(trainer, engines, refusals)


def break_head_packing(engine: RolloutEngine) -> None:
    """Cause the fault that only the probe detects: a tied head computes with old weights after new ones arrive."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from rm_robust.rloo.weights import vllm_loader

    repack = vllm_loader.repack
    vllm_loader.repack = lambda layer: None if isinstance(layer, ParallelLMHead) else repack(layer)


def names_of_loaders(engine: RolloutEngine) -> list[str]:
    def of_worker(worker: Any) -> list[str]:
        return [type(loader).__name__ for loader in worker.weight_transfer_engine._loaders.values()]

    [names] = engine._llm.collective_rpc(of_worker)
    return names


def errors_as_they_are_written(_: RolloutEngine) -> list[str]:
    """Log one error under our name and one under vLLM's, and return the lines as they are written."""
    (handler,) = logging.getLogger().handlers
    written = handler.stream = io.StringIO()
    for name in ("rm_robust.some_module", "vllm.some_module"):
        logging.getLogger(name).error("lost")
    handler.stream = sys.stderr
    return written.getvalue().splitlines()


def wait_until_restarted(engine: ActorHandle) -> None:
    deadline_s = time.monotonic() + 200
    while time.monotonic() < deadline_s:
        # an engine that cannot start again raises ActorDiedError, which says why
        with contextlib.suppress(ActorUnavailableError):
            assert ray.get(engine.policy_version.remote()) is None
            return
        time.sleep(0.2)
    raise AssertionError("the engine did not come back within 200 s")


def requests_of(
    prompts: list[list[int]], *, num_completions: int = 3, max_new_tokens: int = 12, first_seed: int = 0
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_id=f"prompt-{index}",
            prompt_ids=prompt,
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            stop_token_ids=[STOP_TOKEN_ID],
            seed=first_seed + index,
        )
        for index, prompt in enumerate(prompts)
    ]


def sample(engine: ActorHandle, requests: list[GenerationRequest]) -> list[PromptCompletions]:
    answers = dict(answer for finished in engine.generate.remote(requests) for answer in ray.get(finished))
    return [answers[position] for position in range(len(requests))]


def token_ids_of(answers: list[PromptCompletions]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in answer.completions] for answer in answers]


def require_same_policy(connected: ConnectedTrainer, *, version: int) -> list[list[int]]:
    """Assert that every engine samples, scores and continues exactly as the trainer's model does.

    Returns the greedy continuations.
    """
    expected = ray.get(connected.trainer.greedy.remote(PROMPTS, 16))
    for engine in connected.engines:
        assert ray.get(engine.policy_version.remote()) == version
        assert ray.get(engine.greedy.remote(PROMPTS, 16)) == expected
        for answer in sample(engine, requests_of(PROMPTS)):
            for completion in answer.completions:
                trainer_logprobs = ray.get(connected.trainer.logprobs.remote(answer.prompt_ids, completion.token_ids))
                scored_logprobs = ray.get(engine.score_tokens.remote(answer.prompt_ids, completion.token_ids))
                assert completion.policy_version == version
                assert completion.sampler_logprobs == pytest.approx(trainer_logprobs, abs=LOGPROB_TOLERANCE)
                assert scored_logprobs == pytest.approx(trainer_logprobs, abs=LOGPROB_TOLERANCE)
    return expected


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_engines_equal_transformers_after_every_update(model: str, request: pytest.FixtureRequest) -> None:
    connected: ConnectedTrainer = request.getfixturevalue(model)
    continuations = []
    for version in (1, 2):
        ray.get(connected.trainer.change_weights.remote(seed=version))
        report = ray.get(connected.trainer.publish.remote(version))
        assert (report.version, report.num_engines) == (version, len(connected.engines))
        continuations.append(require_same_policy(connected, version=version))
    assert all(first != second for first, second in zip(*continuations, strict=True)), (
        "the updates must change the output, or this test cannot fail"
    )
    ray.get(connected.trainer.change_weights.remote(seed=3))  # changes the memory that the engines have read
    for engine in connected.engines:
        assert ray.get(engine.greedy.remote(PROMPTS, 16)) == continuations[-1], (
            "an engine must not follow its trainer before it is told"
        )
    assert [ray.get(engine.__ray_call__.remote(names_of_loaders)) for engine in connected.engines] == [
        ["DirectLoader"]
    ] * len(connected.engines)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size", ["20 M", "100 M"])
def test_larger_engines_equal_transformers_after_every_update(
    ray_session: None, tmp_path: Path, size: str, is_tied: bool
) -> None:
    """Each update passes the checksums and the probe, or publishing raises."""
    model_dir = save_qwen2(tmp_path, sized_qwen2_config(size, tie_word_embeddings=is_tied))
    engine = start_engine(model_dir)
    connected = connect_trainer(model_dir, [engine])
    continuations = []
    for version in (1, 2, 3):
        ray.get(connected.trainer.change_weights.remote(seed=version, scale=0.02))
        ray.get(connected.trainer.publish.remote(version))
        continuations.append(require_same_policy(connected, version=version))
    ray.get(connected.trainer.change_weights.remote(seed=4, scale=0.02))
    assert ray.get(engine.greedy.remote(PROMPTS, 16)) == continuations[-1], (
        "an engine must not follow its trainer before it is told"
    )
    assert len({str(greedy) for greedy in continuations}) == 3, "the updates must change the output"
    for actor in (engine, connected.trainer):
        ray.kill(actor)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_engines_on_another_machine_equal_transformers_too(model: str, request: pytest.FixtureRequest) -> None:
    connected: ConnectedTrainer = request.getfixturevalue(model)
    ray.get(connected.trainer.change_weights.remote(seed=30))
    ray.get(connected.trainer.publish_over_sockets.remote(2))
    require_same_policy(connected, version=2)


@pytest.mark.slow
def test_a_model_whose_weights_vllm_transposes_is_updated_by_vllms_own_loader(
    ray_session: None, tmp_path: Path
) -> None:
    """Transformers keeps GPT-2's weights as [in, out]; its head is tied as well."""
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=MAX_MODEL_LEN,
        n_embd=128,
        n_layer=2,
        n_head=4,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    engine = start_engine(tmp_path)
    connected = connect_trainer(tmp_path, [engine])
    for version in (1, 2):
        ray.get(connected.trainer.change_weights.remote(seed=version))
        ray.get(connected.trainer.publish.remote(version))
        require_same_policy(connected, version=version)
    loaders = ray.get(engine.__ray_call__.remote(names_of_loaders))
    assert loaders == ["LayerwiseLoader"]
    for actor in (engine, connected.trainer):
        ray.kill(actor)


def test_the_probe_refuses_an_engine_whose_tied_head_is_stale(ray_session: None, tmp_path: Path) -> None:
    model_dir = save_tiny_qwen2(tmp_path, tie_word_embeddings=True, seed=4)
    engine = start_engine(model_dir)
    connected = connect_trainer(model_dir, [engine])
    ray.get(engine.__ray_call__.remote(break_head_packing))
    ray.get(connected.trainer.change_weights.remote(seed=70))
    with pytest.raises(
        RayTaskError, match=r"does not compute with policy version 1: .* differ from the trainer's by up to \d"
    ) as failure:
        ray.get(connected.trainer.publish.remote(1))
    assert isinstance(failure.value.as_instanceof_cause(), RolloutError)
    assert ray.get(engine.policy_version.remote()) is None
    with pytest.raises(RayTaskError, match="refuses to generate"):
        sample(engine, requests_of(PROMPTS))
    with pytest.raises(RayTaskError, match="Cannot confirm policy version 1"):
        ray.get(engine.confirm_version.remote(1))
    ray.get(connected.trainer.publish_without_probe.remote(2))
    greedy = ray.get(engine.greedy.remote(PROMPTS, 16))
    assert greedy != ray.get(connected.trainer.greedy.remote(PROMPTS, 16)), (
        "without the probe the stale head is not detected, because the checksums are right"
    )
    for actor in (engine, connected.trainer):
        ray.kill(actor)


@pytest.mark.slow
def test_a_bfloat16_engine_passes_the_probe_of_a_float32_trainer_within_its_wider_tolerance(
    ray_session: None, tmp_path: Path
) -> None:
    model_dir = save_tiny_qwen2(tmp_path, tie_word_embeddings=True, seed=5)
    engine = start_engine(model_dir, dtype="bfloat16")
    connected = connect_trainer(model_dir, [engine])
    ray.get(connected.trainer.change_weights.remote(seed=80))
    ray.get(connected.trainer.publish.remote(1))
    (first_id, *other_ids), trainer_logprobs = ray.get(connected.trainer.probe_logprobs.remote())
    engine_logprobs = ray.get(engine.score_tokens.remote([first_id], other_ids))
    largest = max(abs(engine - trainer) for engine, trainer in zip(engine_logprobs, trainer_logprobs, strict=True))
    assert PROBE_TOLERANCE["float32"] < largest < PROBE_TOLERANCE["bfloat16"] / 2
    for actor in (engine, connected.trainer):
        ray.kill(actor)


def test_an_engine_refuses_to_generate_before_its_first_update(tied: ConnectedTrainer) -> None:
    assert len(tied.refusals) == 2
    for refusal in tied.refusals:
        assert "RolloutError" in refusal
        assert "no update yet" in refusal


def test_an_engine_listens_for_its_trainer_where_ray_does(untied: ConnectedTrainer) -> None:
    interface = ray.get(untied.engines[0].__ray_call__.remote(lambda _: os.environ[INTERFACE_VARIABLE]))
    assert ray.util.get_node_ip_address() in [address.address for address in psutil.net_if_addrs()[interface]]


def test_the_log_lines_of_an_engine_and_of_vllm_name_run_and_worker(untied: ConnectedTrainer) -> None:
    lines = [json.loads(line) for line in ray.get(untied.engines[0].__ray_call__.remote(errors_as_they_are_written))]
    assert [line.pop("logger") for line in lines] == ["rm_robust.some_module", "vllm.some_module"]
    for line in lines:
        del line["time"]
        assert line == {"level": "ERROR", "run": "mine", "stage": "rloo", "worker": "engine 1", "message": "lost"}


def test_published_bytes_are_all_parameters_once(tied: ConnectedTrainer, untied: ConnectedTrainer) -> None:
    """The numbers are counted by hand, for float32.

    Embedding 512·128; per layer q and o 128², k and v 64·128, biases 128 + 2·64, MLP 3·128·256, norms 2·128; final norm
    128.
    """
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 128 + 2 * 64 + 3 * 128 * 256 + 2 * 128
    tied_bytes = 4 * (512 * 128 + 2 * layer + 128)
    assert ray.get(tied.trainer.publish.remote(3)).num_bytes == tied_bytes
    assert ray.get(untied.trainer.publish.remote(3)).num_bytes == tied_bytes + 4 * 512 * 128


def test_sampler_logprobs_are_of_the_distribution_at_the_requests_temperature(untied: ConnectedTrainer) -> None:
    requests = [replace(request, temperature=0.7) for request in requests_of(PROMPTS)]
    for answer in sample(untied.engines[0], requests):
        for completion in answer.completions:
            at_temperature, at_one = (
                ray.get(untied.trainer.logprobs.remote(answer.prompt_ids, completion.token_ids, t)) for t in (0.7, 1.0)
            )
            assert completion.sampler_logprobs == pytest.approx(at_temperature, abs=LOGPROB_TOLERANCE)
            assert completion.sampler_logprobs != pytest.approx(at_one, abs=0.01)


def test_completions_keep_the_order_and_counts_of_the_requests(untied: ConnectedTrainer) -> None:
    requests = requests_of(PROMPTS[::-1], num_completions=4, max_new_tokens=6)
    answers = sample(untied.engines[0], requests)
    assert [(answer.prompt_id, answer.prompt_ids) for answer in answers] == [
        (request.prompt_id, request.prompt_ids) for request in requests
    ]
    for answer in answers:
        assert len(answer.completions) == 4
        for completion in answer.completions:
            assert len(completion.token_ids) == len(completion.sampler_logprobs)
            assert completion.is_truncated == (completion.token_ids[-1] != STOP_TOKEN_ID)
            assert (
                len(completion.token_ids) == 6
                if completion.is_truncated
                else STOP_TOKEN_ID not in completion.token_ids[:-1]
            )


def test_a_seed_fixes_the_completions_of_a_prompt_whatever_the_batch(untied: ConnectedTrainer) -> None:
    """60 prompts of 100 tokens are more than one scheduler step takes (4096 tokens).

    vLLM would therefore split prompts if it were allowed to.
    """
    engine = untied.engines[0]
    requests = requests_of(
        [prompt_ids(100, seed=100 + index) for index in range(60)], num_completions=2, max_new_tokens=4
    )
    together = token_ids_of(sample(engine, requests))
    apart = token_ids_of(sample(engine, requests[-3:]))
    assert together[-3:] == apart
    other_seed = token_ids_of(
        sample(engine, requests_of([requests[-1].prompt_ids], num_completions=2, max_new_tokens=4, first_seed=5000))
    )
    assert other_seed[0] != apart[-1]
    assert apart[-1][0] != apart[-1][1], "two completions of one request must differ"


def test_a_request_that_does_not_fit_is_refused(untied: ConnectedTrainer) -> None:
    too_long = requests_of([prompt_ids(MAX_MODEL_LEN - 4, seed=7)], max_new_tokens=5)
    with pytest.raises(RayTaskError, match="does not fit"):
        sample(untied.engines[0], too_long)
    fitting = requests_of([prompt_ids(MAX_MODEL_LEN - 5, seed=7)], max_new_tokens=5)
    assert len(sample(untied.engines[0], fitting)) == 1


def test_an_engine_refuses_after_a_failed_update_until_one_succeeds(tied: ConnectedTrainer) -> None:
    """Only keys arrive, so every attention layer has only a quarter of its fused parameters.

    With the queries of the next update it could look complete.
    """
    ray.get(tied.trainer.change_weights.remote(seed=40))
    keys = [f"model.layers.{layer}.self_attn.k_proj.{kind}" for layer in range(2) for kind in ("weight", "bias")]
    with pytest.raises(RayTaskError, match="sent no weights for") as failure:
        ray.get(tied.trainer.publish_only.remote(keys, version=4))
    assert isinstance(failure.value.as_instanceof_cause(), RolloutError)
    for engine in tied.engines:
        assert ray.get(engine.policy_version.remote()) is None
        with pytest.raises(RayTaskError, match="refuses to generate"):
            sample(engine, requests_of(PROMPTS))
        with pytest.raises(RayTaskError, match="Cannot confirm policy version 4"):
            ray.get(engine.confirm_version.remote(4))
    ray.get(tied.trainer.change_weights.remote(seed=41))
    ray.get(tied.trainer.publish.remote(5))
    require_same_policy(tied, version=5)


def test_engines_do_not_wait_for_a_trainer_that_broke_while_sending(tied: ConnectedTrainer) -> None:
    start_s = time.monotonic()
    with pytest.raises(RayTaskError, match="broke while it was sending"):
        ray.get(tied.trainer.publish_and_break.remote(version=6))
    assert ray.get([engine.policy_version.remote() for engine in tied.engines]) == [None, None]
    assert time.monotonic() - start_s < SYNC_TIMEOUT_S / 4
    ray.get(tied.trainer.publish.remote(7))
    require_same_policy(tied, version=7)


def test_a_trainer_does_not_wait_for_engines_that_cannot_load_its_weights(tied: ConnectedTrainer) -> None:
    start_s = time.monotonic()
    with pytest.raises(RayTaskError, match="no module or parameter named 'foreign'"):
        ray.get(tied.trainer.publish_foreign.remote(version=8))
    assert time.monotonic() - start_s < SYNC_TIMEOUT_S / 4
    ray.get(tied.trainer.publish.remote(9))
    require_same_policy(tied, version=9)


def test_an_update_of_a_trainer_that_vanished_half_way_can_be_repeated(tied: ConnectedTrainer) -> None:
    ray.get(tied.trainer.change_weights.remote(seed=50))
    ray.get(tied.trainer.send_and_vanish.remote())
    with pytest.raises(RayTaskError, match="refuses to generate"):
        sample(tied.engines[0], requests_of(PROMPTS))
    ray.get(tied.trainer.change_weights.remote(seed=51))
    ray.get(tied.trainer.publish.remote(10))
    require_same_policy(tied, version=10)


def test_a_restarted_engine_refuses_until_the_next_publication_which_reaches_all(tied: ConnectedTrainer) -> None:
    victim = tied.engines[1]
    os.kill(ray.get(victim.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    wait_until_restarted(victim)
    with pytest.raises(RayTaskError, match="refuses to generate"):
        sample(victim, requests_of(PROMPTS))
    ray.get(tied.trainer.change_weights.remote(seed=60))
    ray.get(tied.trainer.publish.remote(11))
    require_same_policy(tied, version=11)


def test_publishing_to_a_dead_engine_fails_at_once_and_the_others_can_go_on(
    tied: ConnectedTrainer, tmp_path: Path
) -> None:
    survivor, victim = tied.engines
    ray.kill(victim)
    start_s = time.monotonic()
    with pytest.raises(RayTaskError, match="did not reach all 2 engines"):
        ray.get(tied.trainer.publish.remote(12))
    assert time.monotonic() - start_s < SYNC_TIMEOUT_S / 4
    with pytest.raises(RayTaskError, match="refuses to generate"):
        sample(survivor, requests_of(PROMPTS))
    model_dir = save_tiny_qwen2(tmp_path, tie_word_embeddings=True, seed=9)
    require_same_policy(connect_trainer(model_dir, [survivor]), version=0)
