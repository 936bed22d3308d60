"""Gold scores for generated responses, from any Scorer: rows of prompt, model, completion and gold_score, as data.source = "responses" reads them.

responses/<model>/chunk_00000.jsonl of all models ─a prompt's completions in one request─► <folder>/labelled/chunk_00000.jsonl

A prompt's completions that get no score (too long for the scorer, not finite) and those that are empty are left out and counted.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from rm_robust.errors import DataError, RefusedInputError, ScoringError
from rm_robust.responses.response_files import Response, chunk_path, read_responses
from rm_robust.runs.storage.commits import write_json_atomic, write_text_atomic
from rm_robust.scoring.contract import ScoreInput, Scorer

PROMPTS_AT_A_TIME = 32


def label(models: Sequence[str], num_chunks: int, folder: Path, scorer: Scorer) -> str:
    """Write the files of the chunks that are not there yet; returns the checkpoint that all labels are of.

    Raises ScoringError when scoring fails or another checkpoint answers, DataError when the folder has labels of another.
    """
    labelled = folder / "labelled"
    labelled.mkdir(exist_ok=True)
    checkpoint = ""
    for number in tqdm(range(num_chunks), desc="label", unit=" chunks", mininterval=2):
        path = labelled / f"chunk_{number:05}.jsonl"
        rows, left_out = None, dict[str, int]()
        if path.exists():
            own = json.loads(_report_path(path).read_text())["checkpoint"]
        else:
            rows, own, left_out = _labelled(
                [response for model in models for response in read_responses(chunk_path(folder, model, number))], scorer
            )
        if checkpoint and own and own != checkpoint:
            raise DataError(
                f"Chunk {number} has labels of {own}, those before it are of {checkpoint}. Delete {labelled} to label with one scorer."
            )
        checkpoint = checkpoint or own
        if rows is not None:
            write_json_atomic(
                _report_path(path), {"checkpoint": own, "num_left_out": left_out}
            )  # before the rows, which say that the chunk is done
            write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return checkpoint


def num_left_out(folder: Path) -> dict[str, int]:
    """By reason, of all chunks."""
    counts: Counter[str] = Counter()
    for path in (folder / "labelled").glob("chunk_*.jsonl"):
        counts.update(json.loads(_report_path(path).read_text())["num_left_out"])
    return dict(counts)


def _report_path(path: Path) -> Path:
    """Beside the rows, and not a file that a reader of the folder takes for rows."""
    return path.with_suffix(".report.json")


def _labelled(responses: Sequence[Response], scorer: Scorer) -> tuple[list[dict[str, object]], str, dict[str, int]]:
    """Rows of a chunk, the checkpoint that scored them ("" when there was nothing to score), and what was left out."""
    left_out: Counter[str] = Counter()
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        if response.completion is None:
            left_out["prompt too long for the response model"] += 1
        elif not response.completion.strip():
            left_out["empty"] += 1
        else:
            by_prompt.setdefault(response.prompt_id, []).append(response)
    groups = list(by_prompt.values())
    rows: list[dict[str, object]] = []
    checkpoints: set[str] = set()
    for start in range(0, len(groups), PROMPTS_AT_A_TIME):
        for group, scores, checkpoint in _scored(groups[start : start + PROMPTS_AT_A_TIME], scorer, left_out):
            checkpoints.add(checkpoint)
            rows += [
                {
                    "prompt_id": own.prompt_id,
                    "prompt": own.prompt,
                    "model": own.model,
                    "completion": own.completion,
                    "gold_score": score,
                }
                for own, score in zip(group, scores, strict=True)
            ]
    if len(checkpoints) > 1:
        raise ScoringError(
            f"The scorer has changed from {' to '.join(sorted(checkpoints))}: gold scores of two checkpoints cannot be compared. Label again."
        )
    return rows, next(iter(checkpoints), ""), dict(left_out)


def _scored(
    groups: list[list[Response]], scorer: Scorer, left_out: Counter[str]
) -> list[tuple[list[Response], list[float], str]]:
    """Groups with their scores; what is refused is asked in smaller parts, down to one completion."""
    inputs = [
        ScoreInput(prompt=group[0].prompt, completions=[str(own.completion) for own in group]) for group in groups
    ]
    try:
        reply = scorer.score(inputs)
    except RefusedInputError:
        if len(groups) > 1:
            half = len(groups) // 2
            return _scored(groups[:half], scorer, left_out) + _scored(groups[half:], scorer, left_out)
        if len(groups[0]) > 1:
            return [part for response in groups[0] for part in _scored([[response]], scorer, left_out)]
        left_out["refused by the scorer"] += 1
        return []
    return [(group, scores, reply.checkpoint) for group, scores in zip(groups, reply.scores, strict=True)]
