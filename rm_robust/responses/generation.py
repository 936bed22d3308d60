"""Generate the responses of named models to prompts, with vLLM engines under Ray Data.

prompts ─chunks─► Dataset.map(ResponseGenerator, an engine each) ─a line a prompt─► responses/<model>/chunk_00000.jsonl

A chunk's file is complete or does not exist, so the same call goes on where a killed one stopped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm
from transformers import AutoTokenizer

from rm_robust.cluster.environment import cpu_environment
from rm_robust.cluster.worker_server import runtime_env_of
from rm_robust.errors import ConfigError
from rm_robust.responses.config import EnginesConfig, ResponseModel, ResponsesConfig, SamplingConfig
from rm_robust.responses.response_files import Prompt, Response, chunk_path, lines_of
from rm_robust.runs import files as run_files


def check_models(models: Sequence[ResponseModel]) -> None:
    """Raise ConfigError for a model that cannot be loaded or has no chat template, before any engine starts."""
    for model in models:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Response model {model.name}: no tokenizer can be loaded from {model.path!r}: {error}"
            ) from error
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"Response model {model.name}: the tokenizer of {model.path!r} has no chat template, "
                "without which it cannot be asked anything."
            )


def generate(model: ResponseModel, chunks: Sequence[Sequence[Prompt]], folder: Path, config: ResponsesConfig) -> None:
    """Write the model's responses to every chunk that has no file of them yet, below `folder`."""
    missing = [number for number in range(len(chunks)) if not chunk_path(folder, model.name, number).exists()]
    if not missing:
        return
    engines = config.engines
    on_cpu = engines.num_gpus_per_engine == 0
    generator: Any = ResponseGenerator  # Dataset.map creates it in its workers
    rows = [
        {"chunk": number, "prompts": json.dumps([asdict(prompt) for prompt in chunks[number]])} for number in missing
    ]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        generator,
        fn_constructor_kwargs={"model": model, "sampling": config.sampling, "engines": engines, "seed": config.seed},
        concurrency=min(engines.num_engines, len(rows)),
        num_cpus=engines.num_cpus_per_engine,
        num_gpus=engines.num_gpus_per_engine,
        resources=engines.resources_per_engine,
        runtime_env=runtime_env_of(cpu_environment(engines.num_threads)) if on_cpu else None,
    )
    with tqdm(desc=f"generate {model.name}", unit=" prompts", total=sum(map(len, chunks)), mininterval=2) as progress:
        progress.update(sum(map(len, chunks)) - sum(len(chunks[number]) for number in missing))
        for row in answered.iter_rows():
            path = chunk_path(folder, model.name, row["chunk"])
            path.parent.mkdir(parents=True, exist_ok=True)
            run_files.write_text(path, row["responses"])
            progress.update(len(chunks[row["chunk"]]))


class ResponseGenerator:
    """One vLLM engine in a worker of Ray Data. It takes a chunk's prompts and returns the lines of the chunk's file."""

    def __init__(self, *, model: ResponseModel, sampling: SamplingConfig, engines: EnginesConfig, seed: int) -> None:
        from vllm import LLM

        on_cpu = engines.num_gpus_per_engine == 0
        cpu_settings: dict[str, Any] = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": engines.kv_cache_memory_bytes,
            "enable_chunked_prefill": False,  # vLLM 0.32 dies when it splits the prompt of a seeded request on CPU
        }
        self._llm = LLM(
            model.path,
            dtype=engines.dtype,
            max_model_len=engines.max_model_len,
            seed=seed,
            tensor_parallel_size=max(1, engines.num_gpus_per_engine),
            generation_config="vllm",  # not the checkpoint's sampling defaults
            use_tqdm_on_load=False,
            **(cpu_settings if on_cpu else {}),
        )
        self._tokenizer = AutoTokenizer.from_pretrained(model.path)
        self._model, self._sampling, self._seed = model, sampling, seed
        self._max_prompt_tokens = engines.max_model_len - sampling.max_new_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompts = [Prompt(**prompt) for prompt in json.loads(row["prompts"])]
        token_ids = [self._prompt_ids(prompt) for prompt in prompts]
        responses = self._responses(prompts, token_ids)
        return {"chunk": row["chunk"], "responses": lines_of(responses)}

    def _responses(self, prompts: list[Prompt], token_ids: list[list[int]]) -> list[Response]:
        """Return the responses in the order of the prompts."""
        from vllm import TokensPrompt

        fitting = [index for index, ids in enumerate(token_ids) if len(ids) <= self._max_prompt_tokens]
        inputs = [TokensPrompt(prompt_token_ids=token_ids[index]) for index in fitting]
        outputs = (
            self._llm.generate(inputs, [self._params(prompts[index]) for index in fitting], use_tqdm=False)
            if inputs
            else []
        )
        answers = {index: output.outputs[0] for index, output in zip(fitting, outputs, strict=True)}
        return [
            Response(
                prompt.prompt_id,
                prompt.messages,
                self._model.name,
                completion=answers[index].text if index in answers else None,
                num_tokens=len(answers[index].token_ids) if index in answers else len(token_ids[index]),
                is_truncated=index in answers and answers[index].finish_reason == "length",
            )
            for index, prompt in enumerate(prompts)
        ]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        token_ids: Any = self._tokenizer.apply_chat_template(
            prompt.messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(token_ids)

    def _params(self, prompt: Prompt) -> Any:
        """Return sampling parameters with a seed for this prompt, so that the response does not depend on the chunk."""
        from vllm import SamplingParams

        identity = hashlib.sha256(f"{self._seed}:{self._model.name}:{prompt.prompt_id}".encode()).digest()
        return SamplingParams(
            temperature=self._sampling.temperature if self._model.temperature is None else self._model.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_new_tokens,
            seed=int.from_bytes(identity[:4], "big") >> 1,
        )
