"""Scores a jsonl file of any size over HTTP, in constant memory; a command that was stopped goes on where it stopped.

    python -m rm_robust.scoring score --url http://127.0.0.1:8000 data.jsonl         writes data.scores.jsonl

Each input line is {"prompt": text or messages, "completions": [text, …]}; other columns are ignored. Line i of the output is
{"line": i, "scores": [float, …], "model": "…", "checkpoint": "sha256:…"}: as many lines, in the same order, all from one checkpoint.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from tqdm import tqdm

from rm_robust.errors import DataError, RmRobustError
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput

INPUTS_AT_A_TIME = 512
LINE_START = b'{"line": '


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m rm_robust.scoring`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rm_robust.scoring", description="Scores over HTTP. The key is taken from RM_ROBUST_API_KEY."
    )
    score = parser.add_subparsers(required=True).add_parser("score", help="score a jsonl file; again continues")
    score.add_argument("data", type=Path, help='jsonl file of {"prompt": …, "completions": […]}')
    score.add_argument("--url", required=True, help="where /v1/score is, e.g. http://127.0.0.1:8000")
    score.add_argument("--out", type=Path, help="jsonl file to write (default: DATA with .scores.jsonl at its end)")
    parsed = parser.parse_args(arguments)
    out = parsed.out or parsed.data.with_suffix(".scores.jsonl")
    try:
        with RewardClient(parsed.url) as client:
            num_scored = score_file(client, parsed.data, out)
    except RmRobustError as error:
        print(f"error: {error}\nWhat is in {out} stays; the same command goes on from there.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on where {out} ends", file=sys.stderr)
        return 130
    print(f"{num_scored} lines of {parsed.data} are scored in {out}")
    return 0


def score_file(client: RewardClient, data: Path, out: Path) -> int:
    """Append the scores of the lines that `out` lacks; returns the number of lines then scored.

    Raises DataError naming the line that is not an input, and when `out` is not of this data; ScoringError when scoring fails or the checkpoint is no
    longer the one of the earlier lines. Whole lines only are kept of a killed process.
    """
    num_done, checkpoint = _resume(out)
    with (
        data.open("rb") as source,
        out.open("ab") as target,
        tqdm(desc="score", unit=" lines", initial=num_done, mininterval=2) as bar,
    ):
        lines = enumerate(source, start=1)
        num_skipped = sum(1 for _ in itertools.islice(lines, num_done))
        if num_skipped < num_done:
            raise DataError(
                f"{out} has {num_done} lines and {data} only {num_skipped}: they do not belong together. Name another --out."
            )
        while batch := list(itertools.islice(lines, INPUTS_AT_A_TIME)):
            reply = client.score([_input(data, number, line) for number, line in batch])
            if checkpoint not in (None, reply.checkpoint):
                raise DataError(
                    f"{out} holds scores of {checkpoint}, the server now has {reply.checkpoint}: they cannot be compared. Name another --out."
                )
            checkpoint = reply.checkpoint
            rows = (
                {"line": n, "scores": s, "model": reply.model, "checkpoint": checkpoint}
                for (n, _), s in zip(batch, reply.scores, strict=True)
            )
            _append(target, rows)
            num_done += len(batch)
            bar.update(len(batch))
    return num_done


def _append(target: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    target.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    target.flush()


def _input(data: Path, number: int, line: bytes) -> ScoreInput:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise DataError(f"{data}, line {number} is not a JSON object.")
        return ScoreInput.model_validate({name: row[name] for name in ("prompt", "completions") if name in row})
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        reason = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}" if reason else str(error)
        raise DataError(f"{data}, line {number} is not an input: {what}. Correct or remove it.") from error


def _resume(out: Path) -> tuple[int, str | None]:
    """Lines already scored and their checkpoint; a torn last line is cut off."""
    if not out.exists():
        return 0, None
    num_lines, end, checkpoint = 0, 0, None
    with out.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                if not line.startswith(LINE_START[: len(line)]):
                    raise DataError(f"{out}, line {num_lines + 1} was not written by this command. Name another --out.")
                break
            num_lines, end = num_lines + 1, end + len(line)
            try:
                row = json.loads(line)
                number, checkpoint = row["line"], row["checkpoint"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{out}, line {num_lines} was not written by this command. Name another --out."
                ) from error
            if number != num_lines:
                raise DataError(f"{out}, line {num_lines} says that it is line {number}. Name another --out.")
        file.truncate(end)
    return num_lines, checkpoint
