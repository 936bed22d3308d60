"""Ray Data: read text rows -> validate -> tokenise -> parquet, with a report of every dropped row (shared by SFT, preferences and RLOO prompts).

files ─read─► rows ─parse (rows.py)─► ConversationGroup ─chat.py─► token ids ─► <out>/scenario=<name>/*.parquet + report.json
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute  # noqa: F401  (pa.compute)
import pyarrow.parquet as pq

from rm_robust.chat import ChatFormat
from rm_robust.checkpoint import commit_directory
from rm_robust.errors import DataError, RmRobustError
from rm_robust.records import ConversationGroup
from rm_robust.rows import RowKind, kind_of, parse_row
from rm_robust.token_files import TOKEN_SCHEMA

logger = logging.getLogger(__name__)

MALFORMED = "malformed"
IDENTICAL = "identical completions"
PROMPT_TOO_LONG = "prompt too long"
COMPLETION_TOO_LONG = "completion too long"
_EXAMPLES_PER_REASON = 20
_MAX_TEXT = 300
_PART_BYTES = 2**20
_chats: dict[str, ChatFormat] = {}


@dataclass(frozen=True)
class Source:
    """Files that hold one scenario (or "sft", "rloo_prompts"). `kind` None: told by the columns."""

    scenario: str
    paths: tuple[str, ...]
    kind: RowKind | None


@dataclass(frozen=True)
class TokenLimits:
    """What a row may hold, and how many malformed rows a source may hold. Completions count their end-of-turn token."""

    max_prompt_tokens: int
    max_completion_tokens: int
    max_dropped_fraction: float


@dataclass(frozen=True)
class TokeniseReport:
    """Counts by scenario: rows read, kept, and dropped by reason; with the first dropped rows of each and why."""

    num_read: dict[str, int]
    num_kept: dict[str, int]
    num_dropped: dict[str, dict[str, int]]
    examples: list[dict[str, str]]


def check_sources(sources: list[Source]) -> None:
    """Raise DataError for a path that is missing, unreadable, empty or of an unknown format; needs no Ray."""
    for source in sources:
        for path in source.paths:
            if path.startswith("hub:"):
                continue
            files = list_files(path)
            if not sum(file.stat().st_size for file in files):
                raise DataError(f"{path} ({source.scenario}) is empty: there is no row in it.")


def list_files(path: str) -> list[Path]:
    """The jsonl or parquet files that `path` names: itself, or those in the folder."""
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"There is no file or folder at {root.absolute()}.")
    files = sorted(f for f in root.rglob("*") if f.suffix in (".jsonl", ".parquet")) if root.is_dir() else [root]
    if not files or {f.suffix for f in files} - {".jsonl", ".parquet"}:
        raise DataError(f"{root} must be a .jsonl or .parquet file, or a folder with such files.")
    return files


def tokenise_sources(sources: list[Source], *, chat_dir: Path, out_dir: Path, limits: TokenLimits) -> TokeniseReport:
    """Run the pipeline and commit `out_dir`. Raises DataError when a source ends empty or too many of its rows are malformed."""
    check_sources(sources)
    rows = [_dataset_of(source, chat_dir=chat_dir, limits=limits) for source in sources]
    dataset = rows[0].union(*rows[1:]) if len(rows) > 1 else rows[0]
    reports: list[TokeniseReport] = []

    def write(folder: Path) -> None:
        staged = folder / "rows"
        dataset.write_parquet(str(staged), partition_cols=["scenario"])
        reports.append(_split_kept(staged, folder, sources))
        shutil.rmtree(staged)
        (folder / "report.json").write_text(json.dumps(asdict(reports[0]), indent=2) + "\n")
        _refuse_bad_sources(reports[0], limits)

    commit_directory(out_dir, write)
    return reports[0]


def tokenise_text(text: str, *, scenario: str, kind: RowKind | None, chat: ChatFormat, limits: TokenLimits) -> dict[str, Any]:
    """One JSON row -> one TOKEN_SCHEMA row; a bad row keeps its reason instead of its tokens."""
    try:
        row = _json_object(text)
        group = parse_row(row, kind or kind_of(set(row)))
        prompt_ids = chat.prompt_ids(group.prompt)
        completion_ids = [chat.completion_ids(completion) for completion in group.completions]
    except RmRobustError as error:
        return _dropped(scenario, f"{MALFORMED}: {error}", text)
    reason = _unusable(group, prompt_ids, completion_ids, limits)
    if reason:
        return _dropped(scenario, reason, text)
    return {
        "scenario": scenario,
        "group_id": group.group_id,
        "prompt_json": json.dumps(group.prompt, ensure_ascii=False),
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "gold_scores": group.gold_scores,
        "models": group.models,
        "margin": group.margin,
        "drop_reason": "",
        "row_text": "",
    }


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a jsonl file. Only "\\n" ends one: JSON texts may hold what str.splitlines takes for a line end, U+2028 for example."""
    with file.open("rb") as lines:
        for line in lines:
            yield _decoded(line)


def _decoded(line: bytes) -> str:
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError:
        return "not UTF-8: " + line.decode(errors="replace")  # no JSON, so that the row counts as malformed


def _json_object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got a {type(row).__name__}")
    return row


def _unusable(group: ConversationGroup, prompt_ids: list[int], completion_ids: list[list[int]], limits: TokenLimits) -> str:
    if len(prompt_ids) > limits.max_prompt_tokens:
        return PROMPT_TOO_LONG
    if any(len(ids) > limits.max_completion_tokens for ids in completion_ids):
        return COMPLETION_TOO_LONG
    if len(set(group.completions)) < len(group.completions):
        return IDENTICAL
    return ""


def _dropped(scenario: str, reason: str, text: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"group_id": "", "prompt_json": "", "prompt_ids": [], "completion_ids": [], "gold_scores": [], "models": [], "margin": None}
    return {"scenario": scenario, **empty, "drop_reason": reason[:_MAX_TEXT], "row_text": text[:_MAX_TEXT]}


def _dataset_of(source: Source, *, chat_dir: Path, limits: TokenLimits) -> Any:

    settings = {"scenario": source.scenario, "kind": source.kind, "chat_dir": str(chat_dir), "limits": limits}
    parts = [_read(path) for path in source.paths]
    texts = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    return texts.map_batches(_tokenise_batch, fn_kwargs=settings, batch_format="pyarrow", batch_size=1024)


def _read(path: str) -> Any:
    """A dataset of JSON texts (column "text"): jsonl lines as they are, so that one torn line is one malformed row.

    (Not ray.data.read_text: it cuts lines with str.splitlines, see read_lines.)
    """
    import ray.data

    if path.startswith("hub:"):
        import datasets

        name, _, split = path.removeprefix("hub:").partition(":")
        return ray.data.from_huggingface(datasets.load_dataset(name, split=split or "train")).map_batches(_rows_as_text, batch_format="pyarrow")
    files = list_files(path)
    pieces = [{"path": str(f), "start": start} for f in files if f.suffix == ".jsonl" for start in range(0, f.stat().st_size, _PART_BYTES)]
    parquet = [str(f) for f in files if f.suffix == ".parquet"]
    parts = []
    if pieces:
        parts.append(ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(_lines_of_pieces, batch_format="pyarrow", batch_size=None))
    if parquet:
        parts.append(ray.data.read_parquet(parquet, override_num_blocks=max(2, len(parquet))).map_batches(_rows_as_text, batch_format="pyarrow"))
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]


def _lines_of_pieces(table: pa.Table) -> pa.Table:
    """The lines that begin in [start, start + _PART_BYTES) of each file, but for blank ones."""
    texts: list[str] = []
    for piece in table.to_pylist():
        with open(piece["path"], "rb") as file:
            if piece["start"]:
                file.seek(piece["start"] - 1)
                file.readline()  # the rest of a line that began in an earlier piece
            while file.tell() < piece["start"] + _PART_BYTES and (line := file.readline()):
                texts.append(_decoded(line))
    return pa.table({"text": pa.array([text for text in texts if text.strip()], pa.string())})


def _rows_as_text(table: pa.Table) -> pa.Table:
    return pa.table({"text": [json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist()]})


def _tokenise_batch(table: pa.Table, *, scenario: str, kind: RowKind | None, chat_dir: str, limits: TokenLimits) -> pa.Table:
    if chat_dir not in _chats:  # one tokenizer a worker process
        _chats[chat_dir] = ChatFormat.load(chat_dir)
    rows = [tokenise_text(text, scenario=scenario, kind=kind, chat=_chats[chat_dir], limits=limits) for text in table["text"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=TOKEN_SCHEMA)


def _split_kept(staged: Path, folder: Path, sources: list[Source]) -> TokeniseReport:
    report = TokeniseReport({}, {}, {}, [])
    for source in sources:
        reasons: Counter[str] = Counter()
        report.num_read[source.scenario] = report.num_kept[source.scenario] = 0
        kept_dir = folder / f"scenario={source.scenario}"
        kept_dir.mkdir(exist_ok=True)
        for number, path in enumerate(sorted((staged / f"scenario={source.scenario}").glob("*.parquet"))):
            table = pq.ParquetFile(path).read()
            kept = table.filter(pa.compute.equal(table["drop_reason"], ""))
            dropped = table.filter(pa.compute.not_equal(table["drop_reason"], "")).to_pylist()
            for row in dropped:
                reason = row["drop_reason"].partition(":")[0]
                reasons[reason] += 1
                if reasons[reason] <= _EXAMPLES_PER_REASON:
                    report.examples.append({"scenario": source.scenario, "reason": row["drop_reason"], "row": row["row_text"]})
            report.num_read[source.scenario] += table.num_rows
            report.num_kept[source.scenario] += kept.num_rows
            pq.write_table(kept.drop_columns(["drop_reason", "row_text"]), kept_dir / f"part-{number:05d}.parquet")
        report.num_dropped[source.scenario] = dict(reasons)
        num_kept, num_read = report.num_kept[source.scenario], report.num_read[source.scenario]
        logger.info("tokenised %s: %d of %d rows kept, dropped %s", source.scenario, num_kept, num_read, dict(reasons))
    return report


def _refuse_bad_sources(report: TokeniseReport, limits: TokenLimits) -> None:
    for scenario, num_read in report.num_read.items():
        malformed = report.num_dropped[scenario].get(MALFORMED, 0)
        if malformed > limits.max_dropped_fraction * num_read:
            example = next(e for e in report.examples if e["scenario"] == scenario and e["reason"].startswith(MALFORMED))
            raise DataError(
                f"{malformed} of {num_read} rows of {scenario!r} are malformed, more than data.max_dropped_fraction = {limits.max_dropped_fraction}. "
                f"First: {example['reason']} in {example['row']!r}. Mend the rows, or raise the fraction."
            )
        if not report.num_kept[scenario]:
            raise DataError(
                f"No row of {scenario!r} is left of {num_read} (dropped: {report.num_dropped[scenario]}). Check data.max_prompt_tokens and the source."
            )
