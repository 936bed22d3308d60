"""Compare the training throughput of reward models: rm_robust, TRL's RewardTrainer and a plain loop, on real pairs.

    python -m research.bench.training --data ../shared/data          (make bench-training)

In every comparison the trainers alternate: each runs one round in turn, on the same batches, alone on one thread. The
first comparison also checks that rm_robust and TRL do the same training: their losses must agree to LOSS_TOLERANCE in
every step, or the exit status is 1. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import median

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from research.bench.preference_pairs import (
    SEED,
    Corpus,
    TextPair,
    hh_rlhf_dialogues,
    rmb_pairs,
    save_reward_model,
    tokenise,
)
from research.bench.trainers import (
    TRL_DEFAULTS,
    TRL_WITHOUT_CHECKPOINTING,
    Contender,
    Trainer,
    Work,
    quiet,
    train_one_sequence_at_a_time,
    train_with_rm_robust,
)
from rm_robust.config.training import ModelConfig
from rm_robust.data.records import TokenGroup

PAIRS_PER_STEP = 16
LENGTHS = (256, 512, 1024)
"""The tokens of every sequence, where the growth with length is measured."""
LOSS_TOLERANCE = 1e-4
LARGE = ModelConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=4096,
    max_position_embeddings=1024,
)
SMALL = ModelConfig(
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=1024,
    max_position_embeddings=1024,
)
TRL, OURS, PLAIN = "TRL, its defaults", "rm_robust", "one unpadded forward a sequence"
TRL_BEST, TWO_WORKERS = "TRL at its best: length groups, no checkpointing", "rm_robust, 2 workers"
started_s = time.perf_counter()


@dataclass(frozen=True)
class Entry:
    """One trainer of a comparison."""

    name: str
    trainer: Trainer
    batches: list[list[TokenGroup]] | None = None
    """The batches of this trainer. None: those of the comparison."""
    num_workers: int = 1


@dataclass(frozen=True)
class Comparison:
    """A comparison: the title of its table, its trainers, and how much they do."""

    title: str
    entries: list[Entry]
    """The trainers. Ratios compare with the first one."""
    num_rounds: int
    steps_per_round: int
    is_printed: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of human_pairs.parquet and rmb_pairs.parquet")
    data_dir: Path = parser.parse_args().data
    for name in ("human_pairs.parquet", "rmb_pairs.parquet"):
        if not (data_dir / name).is_file():
            sys.exit(
                f"bench-training: there is no {name} in {data_dir}. "
                "Name the folder that holds it: make bench-training DATA=…"
            )
    quiet()
    peers = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    progress(
        f"{peers}; {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; "
        f"{PAIRS_PER_STEP} pairs a step, float32, 1 thread a trainer"
    )
    with tempfile.TemporaryDirectory(prefix="rm_robust_bench_") as scratch:
        result = run(data_dir, Path(scratch))
    print(json.dumps(result))
    sys.exit(float(result["max_loss_difference"]) > LOSS_TOLERANCE)


def run(data_dir: Path, scratch: Path) -> dict[str, str | float]:
    """Do every comparison, and return the content of the last line."""
    dialogues = hh_rlhf_dialogues(data_dir)
    large, corpus = prepare("hh-rlhf, large", scratch / "large", LARGE, dialogues)
    main_comparison = Comparison(
        "hh-rlhf dialogues, large model",
        [
            Entry(TRL, TRL_DEFAULTS),
            Entry(TRL_BEST, TRL_WITHOUT_CHECKPOINTING, length_grouped(corpus, num_batches=20)),
            *PLAIN_AND_OURS,
        ],
        num_rounds=5,
        steps_per_round=4,
    )
    rounds = compare(main_comparison, large, in_order(corpus))
    difference = max(abs(a - b) for a, b in zip(rounds[TRL].losses, rounds[OURS].losses, strict=True))
    print(
        f"losses of {len(rounds[OURS].losses)} steps, {TRL} and {OURS}: "
        f"largest difference {difference:.1e} (allowed: {LOSS_TOLERANCE:.0e})\n",
        flush=True,
    )

    scaling = [Entry(OURS, train_with_rm_robust), Entry(TWO_WORKERS, train_with_rm_robust, num_workers=2)]
    compare(Comparison("hh-rlhf dialogues, large model, 1 and 2 workers", scaling, 3, 4), large, in_order(corpus))
    lengths = [length for _ in range(3) for length in LENGTHS]
    one_step_each = Comparison(
        "growth with length, large model",
        [Entry(TRL, TRL_DEFAULTS), *PLAIN_AND_OURS],
        len(lengths),
        1,
        is_printed=False,
    )
    print_by_length(
        lengths, compare(one_step_each, large, [synthetic_batch(length, seed=n) for n, length in enumerate(lengths)])
    )
    small, corpus = prepare("hh-rlhf, small", scratch / "small", SMALL, dialogues)
    compare(
        Comparison("hh-rlhf dialogues, small model", [Entry(TRL, TRL_DEFAULTS), *PLAIN_AND_OURS], 3, 2),
        small,
        in_order(corpus),
    )
    long_answers, corpus = prepare("RMB, large", scratch / "rmb", LARGE, rmb_pairs(data_dir))
    compare(
        Comparison("RMB pairs, large model", [Entry(TRL, TRL_DEFAULTS), *PLAIN_AND_OURS], 3, 1),
        long_answers,
        in_order(corpus),
    )
    ours, peer = (round(median(rounds[name].pairs_per_s), 3) for name in (OURS, TRL))
    cpu_ratio = median(rounds[OURS].pairs_per_cpu_s) / median(rounds[TRL].pairs_per_cpu_s)
    progress("done")
    result: dict[str, str | float] = {
        "bench": "training",
        "ours": ours,
        "peer": peer,
        "ratio": round(ours / peer, 3),
        "unit": "pairs/s",
        "cpu_ratio": round(cpu_ratio, 3),
        "max_loss_difference": difference,
    }
    for key, name in (("peer_at_its_best", TRL_BEST), ("plain_loop", PLAIN)):
        result[f"ratio_to_{key}"] = round(ours / median(rounds[name].pairs_per_s), 3)
    return result


PLAIN_AND_OURS = [Entry(PLAIN, train_one_sequence_at_a_time), Entry(OURS, train_with_rm_robust)]


def prepare(name: str, folder: Path, model: ModelConfig, pairs: list[TextPair]) -> tuple[Work, Corpus]:
    """Return the tokenised corpus, and the work for a model on it, which holds no batches yet."""
    corpus = tokenise(pairs, vocab_size=model.vocab_size, folder=folder)
    num_parameters = save_reward_model(folder, model, corpus.chat)
    shape = f"hidden {model.hidden_size}, {model.num_layers} layers, vocabulary {model.vocab_size}"
    progress(f"{name}: {num_parameters / 1e6:.2f} M parameters ({shape}); {corpus.description}")
    return Work(folder / "reward_model", [], 0, corpus.chat.pad_id), corpus


def compare(comparison: Comparison, work: Work, batches: list[list[TokenGroup]]) -> dict[str, Contender]:
    """Run alternating rounds of all trainers, and print them as a table."""
    progress(f"{comparison.title}: {comparison.num_rounds} rounds of {comparison.steps_per_round} step(s)")
    num_steps = comparison.num_rounds * comparison.steps_per_round
    contenders = []
    with ExitStack() as stack:
        for entry in comparison.entries:
            entry_work = replace(
                work,
                batches=(entry.batches or batches)[:num_steps],
                steps_per_round=comparison.steps_per_round,
                world_size=entry.num_workers,
            )
            assert len(entry_work.batches) == num_steps, "too few pairs"
            contenders.append(stack.enter_context(Contender(entry.name, entry.trainer, entry_work)))
        for number in range(comparison.num_rounds):
            for contender in contenders:
                contender.run_round()
            latest = ", ".join(f"{contender.pairs_per_s[-1]:.2f}" for contender in contenders)
            progress(f"  round {number + 1} of {comparison.num_rounds}: {latest} pairs/s")
    if comparison.is_printed:
        print_table(comparison.title, contenders)
    return {contender.name: contender for contender in contenders}


def print_table(title: str, contenders: list[Contender]) -> None:
    base, base_cpu = median(contenders[0].pairs_per_s), median(contenders[0].pairs_per_cpu_s)
    print(f"\n| {title} | pairs/s, median | ratio | pairs/CPU s, median | ratio | pairs/s of each round |")
    print("| --- | --- | --- | --- | --- | --- |")
    for contender in contenders:
        speed, cpu_speed = median(contender.pairs_per_s), median(contender.pairs_per_cpu_s)
        rounds = " ".join(f"{value:.2f}" for value in contender.pairs_per_s)
        cpu_cells = f"{cpu_speed:.2f} | {cpu_speed / base_cpu:.2f}"
        print(f"| {contender.name} | {speed:.2f} | {speed / base:.2f} | {cpu_cells} | {rounds} |")
    print(f"\nload average after it: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPU cores\n", flush=True)


def in_order(corpus: Corpus) -> list[list[TokenGroup]]:
    pairs = corpus.pairs
    return [pairs[i : i + PAIRS_PER_STEP] for i in range(0, len(pairs) - PAIRS_PER_STEP + 1, PAIRS_PER_STEP)]


def length_grouped(corpus: Corpus, *, num_batches: int) -> list[list[TokenGroup]]:
    """Return an even sample, short to long, of the batches that transformers' group_by_length makes of the corpus.

    Every round gets all lengths.
    """
    lengths = [len(pair.prompt_ids) + max(map(len, pair.completion_ids)) for pair in corpus.pairs]
    indices = get_length_grouped_indices(lengths, PAIRS_PER_STEP, generator=torch.Generator().manual_seed(SEED))
    batches = [indices[i : i + PAIRS_PER_STEP] for i in range(0, len(indices) - PAIRS_PER_STEP + 1, PAIRS_PER_STEP)]
    batches.sort(key=lambda batch: max(lengths[i] for i in batch))
    evenly = [batches[round((n + 0.5) * len(batches) / num_batches - 0.5)] for n in range(num_batches)]
    num_rounds = 5
    return [[corpus.pairs[i] for i in batch] for first in range(num_rounds) for batch in evenly[first::num_rounds]]


def synthetic_batch(length: int, *, seed: int) -> list[TokenGroup]:
    """Return a quarter of a step's pairs with random tokens.

    Three quarters of a sequence are its prompt, as in the dialogues. All sequences are equally long, so no trainer
    pads.
    """
    rng = Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, LARGE.vocab_size) for _ in range(count)]

    return [TokenGroup(ids(length * 3 // 4), [ids(length // 4) for _ in range(2)]) for _ in range(PAIRS_PER_STEP // 4)]


def print_by_length(lengths: list[int], contenders: dict[str, Contender]) -> None:
    """Print one line for each trainer: the median pairs/CPU s at each length. `lengths` are those of the rounds."""
    columns = " | ".join(f"{length} tokens" for length in LENGTHS)
    print(f"\n| sequences of equal length, large model, pairs/CPU s (median of 3) | {columns} |")
    print("| --- " * (1 + len(LENGTHS)) + "|")
    for name, contender in contenders.items():
        medians = [
            median(
                speed
                for speed, round_length in zip(contender.pairs_per_cpu_s, lengths, strict=True)
                if round_length == length
            )
            for length in LENGTHS
        ]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |")
    print(flush=True)


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - started_s:4.0f} s] {message}", flush=True)


if __name__ == "__main__":
    main()
