"""Scores for an evaluation, against the way of the paper's released run_kendall.py: one forward a response, batch 1, plain transformers.

    python -m research.bench.evaluation --data ../shared/data          within 10 minutes

Both ways read the same conversations as text, in float32, with the same threads, in one process, in turns. Ours is what evaluate_reward_model.py --model
does: the scores of CheckpointSource. Every score is checked against the other's. The limit is the ratio of the tokens that each computes: a prompt's
completions share the prompt.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForSequenceClassification

from research.bench.preference_pairs import MAX_SEQUENCE_TOKENS, hh_rlhf_dialogues, rmb_pairs, texts_of
from research.bench.scoring import SIZES
from research.bench.scoring_requests import Candidates, best_of_n_lists, rendered, save_scoring_checkpoint, usable
from rm_robust.data.chat import ChatFormat
from rm_robust.evaluation.evaluate import CASES_AT_A_TIME
from rm_robust.scoring.checkpoint_scorer import CheckpointSource
from rm_robust.scoring.contract import ScoreInput

NUM_RESPONSES = 256
NUM_ROUNDS = 5
TOLERANCE = 1e-4

Way = Callable[[], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = hh_rlhf_dialogues(options.data)
    print(
        f"{options.threads} threads, float32; milliseconds a response, median of {NUM_ROUNDS} rounds (least to most)\n"
    )
    print(
        "| data | parameters | responses a prompt | one forward a response | ours | ratio | limit by tokens |\n|---|---|---|---|---|---|---|"
    )
    for config in SIZES.values():
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "reward_model"
            num_parameters = save_scoring_checkpoint(checkpoint, config, texts_of([*pairs, *rmb_pairs(options.data)]))
            chat = ChatFormat.load(checkpoint)
            for name, rows in {
                "hh-rlhf pairs": usable(
                    [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs[:2000]],
                    chat,
                    max_tokens=MAX_SEQUENCE_TOKENS,
                )[0],
                "rmb_bon lists": best_of_n_lists(options.data, chat)[0],
            }.items():
                own = rows[: NUM_RESPONSES // len(rows[0].completions)]
                print(
                    compare(name, num_parameters, own, one_by_one(checkpoint, chat, own), ours(checkpoint, own)),
                    flush=True,
                )


def one_by_one(checkpoint: Path, chat: ChatFormat, rows: Sequence[Candidates]) -> Way:
    """As run_kendall.py does: each conversation rendered, tokenised and scored by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(str(checkpoint), dtype=torch.float32).eval()

    def score() -> list[float]:
        scores = []
        with torch.inference_mode():
            for single in (single for row in rows for single in row.split()):
                token_ids = chat.tokenizer(rendered(single, chat), add_special_tokens=False, return_tensors="pt")[
                    "input_ids"
                ]
                scores.append(float(model(input_ids=token_ids).logits[0, 0]))
        return scores

    return score


def ours(checkpoint: Path, rows: Sequence[Candidates]) -> Way:
    source = CheckpointSource(checkpoint, device="cpu", max_length_tokens=None, max_tokens_per_batch=8192)
    inputs = [ScoreInput(prompt=row.prompt, completions=row.completions) for row in rows]

    def score() -> list[float]:
        parts = [
            source.score(inputs[start : start + CASES_AT_A_TIME]) for start in range(0, len(inputs), CASES_AT_A_TIME)
        ]
        return [score for part in parts for own in part.scores for score in own]

    return score


def compare(name: str, num_parameters: int, rows: Sequence[Candidates], theirs: Way, own: Way) -> str:
    """A line of the table, of NUM_ROUNDS rounds after one that is not timed."""
    num_responses = sum(len(row.completions) for row in rows)
    milliseconds: dict[Way, list[float]] = {theirs: [], own: []}
    reference = theirs()
    for number in range(NUM_ROUNDS + 1):
        for way, times in milliseconds.items():
            started_s = time.perf_counter()
            scores = way()
            if number:
                times.append(1000 * (time.perf_counter() - started_s) / num_responses)
            difference = max(abs(a - b) for a, b in zip(scores, reference, strict=True))
            assert difference < TOLERANCE, f"{name}: a score differs by {difference}"
    limit = sum(len(ids) for row in rows for ids in row.sequences) / sum(
        len(row.prompt_ids) + sum(map(len, row.completion_ids)) for row in rows
    )
    ratio = median(milliseconds[theirs]) / median(milliseconds[own])
    cells = [f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})" for times in milliseconds.values()]
    return f"| {name} | {num_parameters / 1e6:.2f} M | {num_responses / len(rows):.0f} | {cells[0]} | {cells[1]} | {ratio:.2f} | {limit:.2f} |"


if __name__ == "__main__":
    main()
