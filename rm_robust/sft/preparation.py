"""Before SFT: a tokenizer and base model from scratch where the run names no model, and the demonstrations tokenised through Ray Data."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rm_robust.checkpoint import commit_directory
from rm_robust.config import PipelineConfig
from rm_robust.data_files import HUB, list_files, read_lines, read_parquet_rows
from rm_robust.data_pipeline import Source, tokenise_sources
from rm_robust.errors import DataError
from rm_robust.rows import RowKind, parse_demonstration
from rm_robust.rows_tokenising import TokenLimits
from rm_robust.run_layout import RunLayout
from rm_robust.sft.from_scratch import make_tokenizer, save_base_model


def prepare_sft(config: PipelineConfig, run_dir: Path, limits: TokenLimits) -> dict[str, Any]:
    """Commit sft/base (from-scratch runs) and sft/tokens. Returns the counts."""
    layout = RunLayout(run_dir)
    source = Source("sft", (str(layout.world / "sft.jsonl"),) if config.data.source == "embedded" else tuple(config.data.sft), RowKind.DEMONSTRATION)
    if config.model.path is None and not layout.base_model.exists():
        tokenizer = make_tokenizer(_texts(source), vocab_size=config.model.vocab_size)
        commit_directory(layout.base_model, lambda folder: save_base_model(folder, config.model, tokenizer, seed=config.seed))
    chat_dir, resources = Path(layout.base_model_dir(config)), config.data.task_resources
    report = tokenise_sources([source], chat_dir=chat_dir, out_dir=layout.sft_tokens, limits=limits, task_resources=resources)
    return {"sft": asdict(report)}


def _texts(source: Source) -> list[str]:
    """Every turn and completion of the demonstrations, to train a tokenizer on; malformed rows are counted later, by the pipeline."""
    texts: list[str] = []
    for path in source.paths:
        if path.startswith(HUB):
            raise DataError(f"A tokenizer from scratch needs files, got {path}. Set model.path, or download the data set.")
        for file in list_files(path):
            rows = read_parquet_rows(file) if file.suffix == ".parquet" else map(_json_or_empty, read_lines(file))
            for row in rows:
                try:
                    group = parse_demonstration(row)
                except DataError:
                    continue
                texts += [message["content"] for message in group.prompt] + group.completions
    if not texts:
        raise DataError(f"No demonstration in {', '.join(source.paths)} can be read: rows need prompt and completion, or messages.")
    return texts


def _json_or_empty(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
