"""Score a jsonl file of any size over HTTP, in constant memory. A command that was stopped continues where it stopped.

    python -m rm_robust.scoring score --url http://127.0.0.1:8000 data.jsonl         writes data.scores.jsonl

Each input line is {"prompt": text or messages, "completions": [text, …]}; other columns are ignored. Line i of the
output is {"line": i, "scores": [float, …], "model": "…", "checkpoint": "sha256:…"}. The output has as many lines as the
input, in the same order, all from one checkpoint.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from rm_robust.errors import DataError, RmRobustError
from rm_robust.runs.lines import append_rows, end_last_line, rows_of, torn_line
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput

INPUTS_AT_A_TIME = 512
LINE_START = b'{"line": '


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("data", type=Path, help='jsonl file of {"prompt": …, "completions": […]}')
    parser.add_argument("--url", required=True, help="where /v1/score is, e.g. http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, help="jsonl file to write (default: DATA with .scores.jsonl as its suffix)")


def main(options: argparse.Namespace) -> int:
    """Score the file that the options name, and return the exit status."""
    out = options.out or options.data.with_suffix(".scores.jsonl")
    try:
        with RewardClient(options.url) as client:
            num_scored = score_file(client, options.data, out)
    except RmRobustError as error:
        print(f"error: {error}\nWhat is in {out} stays; the same command goes on from there.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on where {out} ends", file=sys.stderr)
        return 130
    print(f"{num_scored} lines of {options.data} are scored in {out}")
    return 0


def score_file(client: RewardClient, data: Path, out: Path) -> int:
    """Append the scores of the lines that `out` lacks, and return the number of lines that are then scored.

    Raises DataError for a line that is not an input, which it names, for an `out` that does not belong to `data`, and
    when the checkpoint is no longer that of the earlier lines. Raises ScoringError when scoring fails. The part of a
    line that a killed process left at the end of `out` is cut off.
    """
    num_done, checkpoint = _resume(out)
    with data.open("rb") as source, tqdm(desc="score", unit=" lines", initial=num_done, mininterval=2) as bar:
        out.touch()
        lines = enumerate(source, start=1)
        num_skipped = sum(1 for _ in itertools.islice(lines, num_done))
        if num_skipped < num_done:
            raise DataError(
                f"{out} has {num_done} lines and {data} only {num_skipped}: they do not belong together. "
                "Name another --out."
            )
        while batch := list(itertools.islice(lines, INPUTS_AT_A_TIME)):
            reply = client.score([_input(data, number, line) for number, line in batch])
            if checkpoint not in (None, reply.checkpoint):
                raise DataError(
                    f"{out} holds scores of {checkpoint}, the server now has {reply.checkpoint}: "
                    "they cannot be compared. Name another --out."
                )
            checkpoint = reply.checkpoint
            rows = (
                {"line": n, "scores": s, "model": reply.model, "checkpoint": checkpoint}
                for (n, _), s in zip(batch, reply.scores, strict=True)
            )
            append_rows(out, rows)
            num_done += len(batch)
            bar.update(len(batch))
    return num_done


def _input(data: Path, number: int, line: bytes) -> ScoreInput:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError("it is not a JSON object")
        return ScoreInput.model_validate({name: row[name] for name in ("prompt", "completions") if name in row})
    except (TypeError, ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        first = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise DataError(f"{data}, line {number} is not an input: {reason}. Correct or remove it.") from error


def _resume(out: Path) -> tuple[int, str | None]:
    """Return the number of lines already scored and their checkpoint, and cut a torn last line off."""
    num_lines, checkpoint = 0, None
    for number, row in _rows_of_scores(out):
        if not isinstance(row, dict) or not {"line", "checkpoint"} <= row.keys():
            raise _foreign(out, number)
        if row["line"] != number:
            raise DataError(f"{out}, line {number} says that it is line {row['line']}. Name another --out.")
        num_lines, checkpoint = number, row["checkpoint"]
    torn = torn_line(out)
    if not torn.startswith(LINE_START[: len(torn)]):
        raise _foreign(out, num_lines + 1)
    if out.exists():
        end_last_line(out)
    return num_lines, checkpoint


def _rows_of_scores(out: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the output file. Raises DataError for a line that is not JSON."""
    number = 0
    try:
        for number, row in rows_of(out):
            yield number, row
    except DataError as error:
        raise _foreign(out, number + 1) from error


def _foreign(out: Path, number: int) -> DataError:
    return DataError(f"{out}, line {number} was not written by this command. Name another --out.")
