"""Measure which forward pass is fastest for scoring on a CPU: milliseconds per dialogue, without HTTP, in one process.

    python -m research.bench.scoring_engines --data ../shared/data --size small --threads 1        a minute or two

"One by one" is plain transformers. The packed forward pass is that of training, evaluation and serving. vLLM's pooling
runner gets the same dialogues as token ids, all at once. "Pairs" compute their prompt once (in vLLM by prefix caching).
Every score is compared with "one by one".
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from research.bench.preference_pairs import hh_rlhf_dialogues, texts_of
from research.bench.scoring import SIZES
from research.bench.scoring_requests import dialogues, save_scoring_checkpoint
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import Layout, lay_out, micro_batches
from rm_robust.models.reward_model import PackedRewardModel, load_reward_model

NUM_PAIRS = 96
NUM_ROUNDS = 5
MAX_BATCH_TOKENS = 2048
TOLERANCE = 1e-4
VLLM_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

Engine = Callable[[], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ |= VLLM_ENVIRONMENT | {"OMP_NUM_THREADS": str(arguments.threads)}
    torch.set_num_threads(arguments.threads)
    pairs = hh_rlhf_dialogues(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "reward_model"
        save_scoring_checkpoint(checkpoint, SIZES[arguments.size], texts_of(pairs))
        chat = ChatFormat.load(checkpoint)
        singles = [TokenGroup(c.prompt_ids, c.completion_ids) for c in dialogues(pairs, chat)[0][: 2 * NUM_PAIRS]]
        compare(engines(checkpoint, chat, singles), num_dialogues=len(singles))


def engines(checkpoint: Path, chat: ChatFormat, singles: list[TokenGroup]) -> dict[str, Engine]:
    """Return all engines by name. The first one is the reference."""
    plain = load_reward_model(checkpoint, dtype=torch.float32).eval()

    def one_by_one() -> list[float]:
        return [
            float(plain(input_ids=torch.tensor([[*group.prompt_ids, *group.completion_ids[0]]])).logits)
            for group in singles
        ]

    def packed(model: torch.nn.Module, groups: list[TokenGroup]) -> list[float]:
        scores: dict[int, list[float]] = {}
        for members in micro_batches(groups, Layout.SEGMENTS, MAX_BATCH_TOKENS):
            scores_N = model(lay_out([groups[i] for i in members], Layout.SEGMENTS, pad_id=chat.pad_id)).scores_N
            parts = scores_N.split([len(groups[i].completion_ids) for i in members])
            scores |= {i: part.tolist() for i, part in zip(members, parts, strict=True)}
        return [score for index in range(len(groups)) for score in scores[index]]

    def of_model(model: torch.nn.Module, groups: list[TokenGroup]) -> Engine:
        return lambda: packed(model, groups)

    pairs = [
        TokenGroup(a.prompt_ids, [*a.completion_ids, *b.completion_ids])
        for a, b in zip(singles[::2], singles[1::2], strict=True)
    ]
    packed_model = PackedRewardModel(copy.deepcopy(plain), Layout.SEGMENTS).eval()
    return {
        "transformers, one by one": one_by_one,
        "packed forward": of_model(packed_model, singles),
        "packed forward, pairs": of_model(packed_model, pairs),
        "vLLM pooling": vllm_pooling(checkpoint, singles, has_prefix_caching=False),
        "vLLM pooling, pairs": vllm_pooling(checkpoint, singles, has_prefix_caching=True),
    }


def vllm_pooling(checkpoint: Path, singles: list[TokenGroup], *, has_prefix_caching: bool) -> Engine:
    num_threads = torch.get_num_threads()
    from vllm import LLM, PoolingParams, TokensPrompt  # vLLM reads the environment when it is imported

    llm = LLM(
        str(checkpoint),
        runner="pooling",
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=has_prefix_caching,
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
    )
    torch.set_num_threads(num_threads)
    prompts = [TokensPrompt(prompt_token_ids=[*group.prompt_ids, *group.completion_ids[0]]) for group in singles]
    params = PoolingParams(task="classify", use_activation=False)

    def score() -> list[float]:
        if has_prefix_caching:
            llm.reset_prefix_cache()
        return [
            float(output.outputs.data)
            for output in llm.encode(prompts, pooling_params=params, pooling_task="classify", use_tqdm=False)
        ]

    return score


def compare(engines: dict[str, Engine], *, num_dialogues: int) -> None:
    """Time NUM_ROUNDS rounds of all engines, after one that is not timed, and print a table."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with torch.inference_mode():
        reference = next(iter(engines.values()))()
        for number in range(NUM_ROUNDS + 1):
            for name, engine in engines.items():
                started_s = time.perf_counter()
                scores = engine()
                if number:
                    seconds[name].append(time.perf_counter() - started_s)
                difference = max(abs(a - b) for a, b in zip(scores, reference, strict=True))
                assert difference < TOLERANCE, f"{name}: a score differs by {difference}"
    for name, of_engine in seconds.items():
        milliseconds = [1000 * value / num_dialogues for value in of_engine]
        print(f"| {name} | {median(milliseconds):.2f} | {min(milliseconds):.2f}-{max(milliseconds):.2f} |")


if __name__ == "__main__":
    main()
