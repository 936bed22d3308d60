"""Tokenise data sources with Ray Data: read rows, validate, tokenise, write parquet, and report every dropped row.

SFT, the preferences and the prompts of RLOO all use it.

files ─files.py─► rows of text ─token_rows.py─► token rows, kept or dropped ─► <out>/scenario=<name>/*.parquet
                                                                            └► <out>/report.json
"""

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute  # noqa: F401  (pa.compute)
import pyarrow.parquet as pq

from rm_robust.data.chat import ChatFormat
from rm_robust.data.files import HUB, lines_from, list_files, read_hub_table
from rm_robust.data.rows import RowKind
from rm_robust.data.token_files import TOKEN_SCHEMA
from rm_robust.data.token_rows import MALFORMED, STAGED_SCHEMA, TokenLimits, tokenise_text
from rm_robust.errors import DataError
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import require_shared

logger = logging.getLogger(__name__)

_EXAMPLES_PER_REASON = 20
"""The number of dropped or truncated rows that the report shows for each source and reason."""
_PIECE_BYTES = 2**20
"""The size of the pieces of a jsonl file that tasks read."""
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
    num_dropped: dict[str, int]
    """Dropped rows by reason."""


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
    """Raise DataError for a path or URI that is missing, unreachable, empty or of an unknown format. Needs no Ray."""
    for source in sources:
        for path in source.paths:
            if not path.startswith(HUB) and not sum(file.num_bytes for file in list_files(path)):
                raise DataError(f"{path} ({source.scenario}) is empty: there is no row in it.")


def tokenise_sources(
    sources: list[DataSource],
    *,
    chat_dir: Path,
    out_dir: Path,
    limits: TokenLimits,
    task_resources: Mapping[str, float] | None = None,
) -> TokeniseReport:
    """Tokenise `sources`, commit the rows and the report to `out_dir`, and return the report.

    Raises DataError when no row of a source is kept, or when too many of its rows are malformed.

    Each task that reads, tokenises or writes asks for `task_resources` beside its CPU. Two tasks of Ray Data 2.60 take
    no such request: the listing of parquet files and the count of a hub data set's blocks. A CPU of any node does for
    them.
    """
    check_sources(sources)
    resources = dict(task_resources or {})
    reports: list[TokeniseReport] = []

    def write(folder: Path) -> None:
        staged = folder / "rows"
        with run_files.written_by_any_node(staged, out_dir) as staging:
            rows = [
                _dataset_of(
                    source, resources, number=number, chat_dir=chat_dir, limits=limits, seen_by_all=staging.seen_by_all
                )
                for number, source in enumerate(sources)
            ]
            dataset = rows[0].union(*rows[1:]) if len(rows) > 1 else rows[0]
            dataset.write_parquet(
                staging.path,
                partition_cols=["scenario"],
                filesystem=staging.filesystem,
                ray_remote_args={"resources": resources},
            )
        reports.append(_split_kept(staged, folder, sources))
        shutil.rmtree(staged)
        (folder / "report.json").write_text(json.dumps(asdict(reports[0]), indent=2) + "\n")
        _refuse_bad_sources(reports[0], limits)

    run_files.commit(out_dir, write)
    return reports[0]


def _dataset_of(
    source: DataSource,
    resources: dict[str, float],
    *,
    number: int,
    chat_dir: Path,
    limits: TokenLimits,
    seen_by_all: Path | None,
) -> Any:
    settings = {
        "source": source,
        "source_number": number,
        "chat_dir": str(chat_dir),
        "limits": limits,
        "seen_by_all": seen_by_all,
    }
    parts = [_read(path, resources) for path in source.paths]
    texts = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    return texts.map_batches(
        _tokenise_batch, fn_kwargs=settings, batch_format="pyarrow", batch_size=_BATCH_ROWS, resources=resources
    )


def _read(path: str, resources: dict[str, float]) -> Any:
    """Return a dataset of JSON texts (column "text").

    Lines of jsonl stay as they are, so that a torn line is one malformed row.

    ray.data.read_text is not used, because it splits lines with str.splitlines (see files.read_lines).
    ray.data.from_huggingface is not used, because its tasks would download again, on any node, what load_dataset has
    downloaded on this one.
    """
    import ray.data

    if path.startswith(HUB):
        table = read_hub_table(path)
        blocks = ray.data.from_arrow(table, override_num_blocks=max(1, math.ceil(table.num_rows / _BATCH_ROWS)))
        return blocks.map_batches(_rows_as_text, batch_format="pyarrow", resources=resources)
    files = list_files(path)
    pieces = [
        {"root": f.root, "path": f.path, "start": start}
        for f in files
        if f.suffix == ".jsonl"
        for start in range(0, f.num_bytes, _PIECE_BYTES)
    ]
    parquet = [f.path for f in files if f.suffix == ".parquet"]
    parts = []
    if pieces:
        items = ray.data.from_items(pieces, override_num_blocks=len(pieces))
        parts.append(items.map_batches(_lines_of_pieces, batch_format="pyarrow", batch_size=None, resources=resources))
    if parquet:
        tables = ray.data.read_parquet(
            parquet,
            filesystem=run_files.filesystem_of(path)[0],
            override_num_blocks=max(2, len(parquet)),
            resources=resources,
        )
        parts.append(tables.map_batches(_rows_as_text, batch_format="pyarrow", resources=resources))
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _lines_of_pieces(table: pa.Table) -> pa.Table:
    """Return the lines that begin in each piece of a file, without blank ones."""
    pieces = table.to_pylist()
    texts = [
        text for p in pieces for text in lines_from(p["root"], p["path"], start=p["start"], num_bytes=_PIECE_BYTES)
    ]
    return pa.table({"text": pa.array([text for text in texts if text.strip()], pa.string())})


def _rows_as_text(table: pa.Table) -> pa.Table:
    return pa.table({"text": [json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist()]})


def _tokenise_batch(
    table: pa.Table,
    *,
    source: DataSource,
    source_number: int,
    chat_dir: str,
    limits: TokenLimits,
    seen_by_all: Path | None,
) -> pa.Table:
    if seen_by_all is not None:
        require_shared(seen_by_all)
    if chat_dir not in _chats:  # one tokenizer a worker process
        run_files.fetch(Path(chat_dir))
        _chats[chat_dir] = ChatFormat.load(chat_dir)
    rows = [
        token_row | {"source_number": source_number}
        for text in table["text"].to_pylist()
        for token_row in tokenise_text(
            text, scenario=source.scenario, kind=source.kind, chat=_chats[chat_dir], limits=limits, weight=source.weight
        )
    ]
    return pa.Table.from_pylist(rows, schema=STAGED_SCHEMA)


def _split_kept(staged: Path, folder: Path, sources: list[DataSource]) -> TokeniseReport:
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
                ["source_number", "num_rows_read", "drop_reason", "truncation", "row_text"]
            ).to_pylist():
                source_number = row["source_number"]
                counts[source_number]["read"] += row["num_rows_read"]
                if row["drop_reason"]:
                    dropped[source_number][_reason(row["drop_reason"])] += 1
                else:
                    counts[source_number]["kept"] += 1
                    counts[source_number]["truncated"] += bool(row["truncation"])
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
            dict(reasons),
        )
        for source, count, reasons in zip(sources, counts, dropped, strict=True)
    ]
    return _summed(reports, examples)


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
            "tokenised %s (%s): %d kept of %d rows, dropped %s, truncated %d",
            *(
                report.scenario,
                _joined(report.paths),
                report.num_kept,
                report.num_read,
                report.num_dropped,
                report.num_truncated,
            ),
        )
    return total


def _refuse_bad_sources(report: TokeniseReport, limits: TokenLimits) -> None:
    for source in report.sources:
        malformed, name = source.num_dropped.get(MALFORMED, 0), f"{source.scenario!r} ({_joined(source.paths)})"
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
