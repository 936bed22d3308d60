"""Compare our scores for an evaluation with those of the paper's released run_kendall.py, which is plain transformers.

    python -m research.bench.evaluation --data ../shared/data          within 10 minutes

run_kendall.py does one forward pass per response, in batches of 1. We do what evaluate_reward_model.py --model does: we
take the scores of CheckpointScorer. Both ways take turns in one process. They read the same conversations as text, in
float32, with the same threads. Every score is compared with the other way's. The limit of the ratio is the ratio of the
tokens that each way computes, because we compute a prompt once for all its completions.
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
from rm_robust.scoring.checkpoint_scorer import CheckpointScorer
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
        f"{options.threads} threads, float32; milliseconds per response, "
        f"median of {NUM_ROUNDS} rounds (least to most)\n"
    )
    print("| data | parameters | responses a prompt | one forward a response | ours | ratio | limit by tokens |")
    print("|---|---|---|---|---|---|---|")
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
                compared = rows[: NUM_RESPONSES // len(rows[0].completions)]
                their_way, our_way = one_by_one(checkpoint, chat, compared), ours(checkpoint, compared)
                print(compare(name, num_parameters, compared, their_way, our_way), flush=True)


def one_by_one(checkpoint: Path, chat: ChatFormat, rows: Sequence[Candidates]) -> Way:
    """Return the way of run_kendall.py: it renders, tokenises and scores each conversation by itself."""
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
    scorer = CheckpointScorer(checkpoint, device="cpu", max_length_tokens=None, max_tokens_per_batch=8192)
    inputs = [ScoreInput(prompt=row.prompt, completions=row.completions) for row in rows]

    def score() -> list[float]:
        parts = [
            scorer.score(inputs[start : start + CASES_AT_A_TIME]) for start in range(0, len(inputs), CASES_AT_A_TIME)
        ]
        return [score for part in parts for case_scores in part.scores for score in case_scores]

    return score


def compare(name: str, num_parameters: int, rows: Sequence[Candidates], their_way: Way, our_way: Way) -> str:
    """Time NUM_ROUNDS rounds of both ways, after one that is not timed, and return a line of the table."""
    num_responses = sum(len(row.completions) for row in rows)
    milliseconds: dict[Way, list[float]] = {their_way: [], our_way: []}
    reference = their_way()
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
    ratio = median(milliseconds[their_way]) / median(milliseconds[our_way])
    cells = [f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})" for times in milliseconds.values()]
    size, per_prompt = f"{num_parameters / 1e6:.2f} M", f"{num_responses / len(rows):.0f}"
    return f"| {name} | {size} | {per_prompt} | {cells[0]} | {cells[1]} | {ratio:.2f} | {limit:.2f} |"


if __name__ == "__main__":
    main()
