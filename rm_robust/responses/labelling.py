"""Gold scores for generated responses, from any Scorer.

The result is rows of prompt, model, completion and gold_score, as data.source = "responses" reads them.

responses/<model>/chunk_00000.jsonl of all models ─a prompt's completions in one request─► labelled/chunk_00000.jsonl

Completions that get no score (too long for the scorer, not finite) and empty completions are left out and counted.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from rm_robust.errors import DataError, RefusedInputError, ScoringError
from rm_robust.responses.response_files import Response, chunk_path, read_responses
from rm_robust.runs import files as run_files
from rm_robust.scoring.contract import ScoreInput, Scorer

PROMPTS_AT_A_TIME = 32


def label(models: Sequence[str], num_chunks: int, folder: Path, scorer: Scorer) -> str:
    """Label every chunk of responses that has no file of labels yet, and return the checkpoint that gave all labels.

    The checkpoint is "" when there was nothing to score in any chunk. Raises ScoringError when scoring fails or another
    checkpoint answers, and DataError when the folder has labels of another checkpoint.
    """
    labelled = folder / "labelled"
    labelled.mkdir(exist_ok=True)
    checkpoint = ""
    for number in tqdm(range(num_chunks), desc="label", unit=" chunks", mininterval=2):
        path = labelled / f"chunk_{number:05}.jsonl"
        rows, left_out = None, dict[str, int]()
        if path.exists():
            chunk_checkpoint = json.loads(_report_path(path).read_text())["checkpoint"]
        else:
            paths = [chunk_path(folder, model, number) for model in models]
            responses = [response for responses_path in paths for response in read_responses(responses_path)]
            rows, chunk_checkpoint, left_out = _labelled(responses, scorer)
        if checkpoint and chunk_checkpoint and chunk_checkpoint != checkpoint:
            raise DataError(
                f"Chunk {number} has labels of {chunk_checkpoint}, those before it are of {checkpoint}. "
                f"Delete {labelled} to label with one scorer."
            )
        checkpoint = checkpoint or chunk_checkpoint
        if rows is not None:
            # The report is written before the rows, because the file of rows says that the chunk is done.
            run_files.write_json(_report_path(path), {"checkpoint": chunk_checkpoint, "num_left_out": left_out})
            run_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return checkpoint


def num_left_out(folder: Path) -> dict[str, int]:
    """Return how many completions of all chunks were left out, by reason."""
    counts: Counter[str] = Counter()
    for path in (folder / "labelled").glob("chunk_*.jsonl"):
        counts.update(json.loads(_report_path(path).read_text())["num_left_out"])
    return dict(counts)


def _report_path(path: Path) -> Path:
    """Return the report's path: beside the rows, but with a name that no reader of the folder takes for rows."""
    return path.with_suffix(".report.json")


def _labelled(responses: Sequence[Response], scorer: Scorer) -> tuple[list[dict[str, object]], str, dict[str, int]]:
    """Return the rows of a chunk, the checkpoint that scored them, and how many completions were left out, by reason.

    The checkpoint is "" when there was nothing to score.
    """
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
                    "prompt_id": response.prompt_id,
                    "prompt": response.prompt,
                    "model": response.model,
                    "completion": response.completion,
                    "gold_score": score,
                }
                for response, score in zip(group, scores, strict=True)
            ]
    if len(checkpoints) > 1:
        raise ScoringError(
            f"The scorer has changed from {' to '.join(sorted(checkpoints))}: "
            "gold scores of two checkpoints cannot be compared. Label again."
        )
    return rows, next(iter(checkpoints), ""), dict(left_out)


def _scored(
    groups: list[list[Response]], scorer: Scorer, left_out: Counter[str]
) -> list[tuple[list[Response], list[float], str]]:
    """Return the groups with their scores and checkpoint.

    A refused request is split and asked again, down to single completions, so that only the completions that are
    refused alone are left out. `left_out` counts them.
    """
    inputs = [
        ScoreInput(prompt=group[0].prompt, completions=[str(response.completion) for response in group])
        for group in groups
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
