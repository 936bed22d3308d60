"""Tokenise data sources with Ray Data: read rows, validate, tokenise, write parquet, and report every dropped row.

SFT, the preferences and the prompts of RLOO all use it.

files ─pieces.py─► rows of text ─token_rows.py─► token rows, kept or dropped ─► <out>/scenario=<name>/*.parquet
                                                                             └► <out>/report.json

All sources are one dataset of Ray Data, so that many small files start no more workers than one large file. One task
reads and tokenises about a mebibyte: a byte range of a jsonl file, some rows of a parquet file, or several small files.
A compressed file and a .json file with a list cannot be read in parts: each is one task.
"""

import json
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute  # noqa: F401  (pa.compute)
import pyarrow.ipc  # noqa: F401  (pa.ipc)
import pyarrow.parquet as pq

from rm_robust.cluster.capacity import wait_for_a_cpu
from rm_robust.config.data import LOST_FRACTION_TO_WARN_OF
from rm_robust.data.chat import ChatFormat
from rm_robust.data.files import (
    HIDDEN,
    HUB,
    FoundFiles,
    find_files,
)
from rm_robust.data.pieces import Piece, parquet_pieces, pieces_of, tasks_of, texts_of_piece
from rm_robust.data.rows import COLUMNS, RowKind
from rm_robust.data.token_files import TOKEN_SCHEMA
from rm_robust.data.token_rows import MALFORMED, STAGED_SCHEMA, TIED, TokenLimits, tokenise_text
from rm_robust.errors import DataError
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import require_shared

logger = logging.getLogger(__name__)

_EXAMPLES_PER_REASON = 20
"""The number of dropped or truncated rows that the report shows for each source and reason."""
_BATCH_ROWS = 1024
_chats: dict[str, ChatFormat] = {}
"""The chat formats that this worker process has loaded, by folder."""


@dataclass(frozen=True)
class DataSource:
    """Files, URIs or hub data sets that hold rows of one scenario (or of "sft" or "rloo_prompts")."""

    scenario: str
    paths: tuple[str, ...]
    kind: RowKind | None
    """The kind of every row; None where each row's columns decide."""
    weight: float = 1.0
    """The weight of each row in the loss."""

    @property
    def columns(self) -> frozenset[str] | None:
        """The columns that are read; None for all of them, which reward functions get with an RLOO prompt."""
        return None if self.kind is RowKind.PROMPT else COLUMNS


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source's rows.

    A ranking in training pairs counts as one row read, and each of its pairs as one row kept or dropped.
    """

    scenario: str
    paths: tuple[str, ...]
    weight: float
    num_read: int
    num_kept: int
    num_truncated: int
    """Kept rows whose prompt was cut on the left."""
    num_merged: int
    """Kept rows in which a token begins in the assistant header and ends in a completion."""
    num_dropped: dict[str, int]
    """Dropped rows by reason."""
    num_skipped_files: dict[str, int]
    """The files in the source's folders that are not read, by reason."""
    skipped_files: list[str]
    """The first of these files."""
    lost_fraction: float
    """The share of the rows that were dropped. Ties are not counted, because a tie is no preference."""


@dataclass(frozen=True)
class TokeniseReport:
    """Counts by scenario and by source, and the first dropped and truncated rows of each source and reason."""

    num_read: dict[str, int]
    num_kept: dict[str, int]
    num_truncated: dict[str, int]
    num_dropped: dict[str, dict[str, int]]
    sources: list[SourceReport]
    examples: list[dict[str, str]]


def check_sources(sources: list[DataSource]) -> None:
    """Raise DataError for a source that cannot be read. Needs no Ray.

    Its path is missing, unreachable, empty or of an unknown format, or a parquet file is damaged or lacks the columns.
    """
    found = [[_found(path, source) for path in source.paths if not path.startswith(HUB)] for source in sources]
    for number, source in enumerate(sources):
        parquet_pieces(number, source.columns, found[number])


def _found(path: str, source: DataSource) -> FoundFiles:
    found = find_files(path)
    if not sum(file.num_bytes for file in found.files):
        raise DataError(f"{path} ({source.scenario}) is empty: there is no row in it.")
    return found


def tokenise_sources(
    sources: list[DataSource],
    *,
    chat_dir: Path,
    out_dir: Path,
    limits: TokenLimits,
    max_lost_fraction: float = 1.0,
    task_resources: Mapping[str, float] | None = None,
) -> TokeniseReport:
    """Tokenise `sources`, commit the rows and the report to `out_dir`, and return the report.

    Raises DataError when no row of a source is kept, when too many of its rows are malformed, or when more than
    `max_lost_fraction` of them are dropped for any reason but a tie.

    Each task that reads, tokenises or writes asks for `task_resources` beside its CPU.
    """
    found = [[_found(path, source) for path in source.paths if not path.startswith(HUB)] for source in sources]
    pieces: list[Piece] = []
    for number, source in enumerate(sources):
        pieces += (own := pieces_of(number, source.paths, source.columns, found[number]))
        if not own:
            raise DataError(f"{_joined(source.paths)} ({source.scenario}) is empty: there is no row in it.")
    resources = dict(task_resources or {})
    wait_for_a_cpu(f"the rows of {', '.join(dict.fromkeys(source.scenario for source in sources))}", resources)
    reports: list[TokeniseReport] = []

    def write(folder: Path) -> None:
        staged = folder / "rows"
        with run_files.written_by_any_node(staged, out_dir) as staging:
            settings = {
                "sources": sources,
                "chat_dir": str(chat_dir),
                "limits": limits,
                "seen_by_all": staging.seen_by_all,
            }
            _dataset_of(pieces, settings, resources).write_parquet(
                staging.path,
                partition_cols=["scenario"],
                filesystem=staging.filesystem,
                ray_remote_args={"resources": resources},
            )
        reports.append(_split_kept(staged, folder, sources, found))
        shutil.rmtree(staged)
        (folder / "report.json").write_text(json.dumps(asdict(reports[0]), indent=2) + "\n")
        _refuse_bad_sources(reports[0], limits, max_lost_fraction)

    run_files.commit(out_dir, write)
    _warn_of_losses(reports[0])
    return reports[0]


def _dataset_of(pieces: list[Piece], settings: dict[str, Any], resources: dict[str, float]) -> Any:
    """Return the dataset of all token rows. ray.data.read_text and read_parquet are not used.

    The first splits lines with str.splitlines (see row_texts.read_lines). The second decodes the columns of all files
    with the types of one file. ray.data.from_huggingface is not used, because its tasks would download again, on any
    node, what load_dataset has downloaded on this one.
    """
    import ray.data

    tasks = [{"pieces": pickle.dumps(task)} for task in tasks_of(pieces)]
    dataset: Any = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    return dataset.map_batches(
        _tokenise_pieces, fn_kwargs=settings, batch_format="pyarrow", batch_size=None, resources=resources
    )


def _tokenise_pieces(
    table: pa.Table,
    *,
    sources: list[DataSource],
    chat_dir: str,
    limits: TokenLimits,
    seen_by_all: Path | None,
) -> Iterator[pa.Table]:
    if seen_by_all is not None:
        require_shared(seen_by_all)
    if chat_dir not in _chats:  # one tokenizer a worker process
        run_files.fetch(Path(chat_dir))
        _chats[chat_dir] = ChatFormat.load(chat_dir)
    for piece in (piece for content in table["pieces"].to_pylist() for piece in pickle.loads(content)):
        source = sources[piece.source_number]
        texts = texts_of_piece(piece)
        while part := list(islice(texts, _BATCH_ROWS)):
            yield _token_table(part, source, piece.source_number, _chats[chat_dir], limits)


def _token_table(
    texts: list[str], source: DataSource, source_number: int, chat: ChatFormat, limits: TokenLimits
) -> pa.Table:
    rows = [
        token_row | {"source_number": source_number}
        for text in texts
        for token_row in tokenise_text(
            text, scenario=source.scenario, kind=source.kind, chat=chat, limits=limits, weight=source.weight
        )
    ]
    return pa.Table.from_pylist(rows, schema=STAGED_SCHEMA)


def _split_kept(staged: Path, folder: Path, sources: list[DataSource], found: list[list[FoundFiles]]) -> TokeniseReport:
    """Write each scenario's kept rows to `folder`, and count the kept and the dropped rows of every source."""
    counts: list[Counter[str]] = [Counter() for _ in sources]
    dropped: list[Counter[str]] = [Counter() for _ in sources]
    num_by_reason: list[Counter[str]] = [Counter() for _ in sources]
    examples: list[dict[str, str]] = []
    for scenario in dict.fromkeys(source.scenario for source in sources):
        kept_dir = folder / f"scenario={scenario}"
        kept_dir.mkdir(exist_ok=True)
        for number, path in enumerate(sorted((staged / f"scenario={scenario}").glob("*.parquet"))):
            table = pq.ParquetFile(path).read()
            pq.write_table(
                table.filter(pa.compute.equal(table["drop_reason"], "")).select(TOKEN_SCHEMA.names),
                kept_dir / f"part-{number:05d}.parquet",
            )
            for row in table.select(
                ["source_number", "num_rows_read", "drop_reason", "truncation", "is_merged", "row_text"]
            ).to_pylist():
                source_number = row["source_number"]
                counts[source_number]["read"] += row["num_rows_read"]
                if row["drop_reason"]:
                    dropped[source_number][_reason(row["drop_reason"])] += 1
                else:
                    counts[source_number]["kept"] += 1
                    counts[source_number]["truncated"] += bool(row["truncation"])
                    counts[source_number]["merged"] += row["is_merged"]
                explanation = row["drop_reason"] or row["truncation"]
                num_by_reason[source_number][_reason(explanation)] += 1
                if explanation and num_by_reason[source_number][_reason(explanation)] <= _EXAMPLES_PER_REASON:
                    examples.append(
                        {
                            "scenario": scenario,
                            "source": _joined(sources[source_number].paths),
                            "reason": explanation,
                            "row": row["row_text"],
                        }
                    )
    reports = [
        SourceReport(
            source.scenario,
            source.paths,
            source.weight,
            count["read"],
            count["kept"],
            count["truncated"],
            count["merged"],
            dict(reasons),
            dict(Counter(file.reason for file in skipped)),
            [f"{file.path}: {file.reason}" for file in skipped[:_EXAMPLES_PER_REASON]],
            _lost_fraction(count["kept"], reasons),
        )
        for source, count, reasons, parts in zip(sources, counts, dropped, found, strict=True)
        for skipped in [sorted((f for part in parts for f in part.skipped), key=lambda file: file.reason == HIDDEN)]
    ]
    return _summed(reports, examples)


def _lost_fraction(num_kept: int, num_dropped: Mapping[str, int]) -> float:
    num_lost = sum(num for reason, num in num_dropped.items() if reason != TIED)
    return num_lost / max(1, num_lost + num_kept)


def _reason(explanation: str) -> str:
    return explanation.partition(":")[0]


def _joined(paths: tuple[str, ...]) -> str:
    return ", ".join(paths)


def _summed(reports: list[SourceReport], examples: list[dict[str, str]]) -> TokeniseReport:
    total = TokeniseReport({}, {}, {}, {}, reports, examples)
    for scenario in dict.fromkeys(report.scenario for report in reports):
        scenario_reports = [report for report in reports if report.scenario == scenario]
        total.num_read[scenario] = sum(report.num_read for report in scenario_reports)
        total.num_kept[scenario] = sum(report.num_kept for report in scenario_reports)
        total.num_truncated[scenario] = sum(report.num_truncated for report in scenario_reports)
        total.num_dropped[scenario] = dict(sum((Counter(report.num_dropped) for report in scenario_reports), Counter()))
    for report in reports:
        logger.info(
            "tokenised %s (%s): %d kept of %d rows, dropped %s, truncated %d, merged with their header %d",
            *(
                report.scenario,
                _joined(report.paths),
                report.num_kept,
                report.num_read,
                report.num_dropped,
                report.num_truncated,
                report.num_merged,
            ),
        )
    return total


def _name_of(source: SourceReport) -> str:
    return f"{source.scenario!r} ({_joined(source.paths)})"


def _warn_of_losses(report: TokeniseReport) -> None:
    for source in report.sources:
        if source.lost_fraction > LOST_FRACTION_TO_WARN_OF:
            logger.warning(
                "%.0f %% of the rows of %s are lost: %d kept of %d, dropped %s. See data.max_prompt_tokens, "
                "data.max_completion_tokens and data.overlong.",
                *(100 * source.lost_fraction, _name_of(source), source.num_kept, source.num_read, source.num_dropped),
            )
        if set(source.num_skipped_files) - {HIDDEN}:
            logger.warning(
                "Files of %s are not read: %s. First: %s",
                *(_name_of(source), source.num_skipped_files, source.skipped_files[0]),
            )


def _refuse_bad_sources(report: TokeniseReport, limits: TokenLimits, max_lost_fraction: float) -> None:
    for source in report.sources:
        malformed, name = source.num_dropped.get(MALFORMED, 0), _name_of(source)
        if malformed > limits.max_dropped_fraction * source.num_read:
            example = next(
                e for e in report.examples if e["source"] == _joined(source.paths) and e["reason"].startswith(MALFORMED)
            )
            raise DataError(
                f"{malformed} of {source.num_read} rows of {name} are malformed, more than "
                f"data.max_dropped_fraction = {limits.max_dropped_fraction}. "
                f"First: {example['reason']} in {example['row']!r}. Fix the rows, or raise the fraction."
            )
        if not source.num_kept:
            raise DataError(
                f"None of the {source.num_read} rows of {name} is kept (dropped: {source.num_dropped}). "
                "Check data.max_prompt_tokens and the source."
            )
        if source.lost_fraction > max_lost_fraction:
            raise DataError(
                f"{100 * source.lost_fraction:.0f} % of the rows of {name} are lost ({source.num_kept} kept of "
                f"{source.num_read} read, dropped: {source.num_dropped}), more than data.max_lost_fraction = "
                f"{max_lost_fraction}. Raise data.max_prompt_tokens or data.max_completion_tokens, set data.overlong = "
                '"truncate_prompt_left", or raise the fraction.'
            )
