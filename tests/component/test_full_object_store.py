"""More data than the object store holds: Ray spills it to disk, and every row is counted all the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rm_robust.data_pipeline import Source, tokenise_sources
from rm_robust.rows import RowKind
from rm_robust.rows_tokenising import TokenLimits
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

STORE_BYTES = 78 * 2**20
"""About the smallest that Ray takes."""
NUM_LONG, NUM_KEPT = 1600, 200
LONG = "red " * 40_000
LIMITS = TokenLimits(max_prompt_tokens=60, max_completion_tokens=40, max_dropped_fraction=0.05)


@pytest.fixture(autouse=True)
def _small_store() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning", object_store_memory=STORE_BYTES)
    yield
    ray.shutdown()


def test_rows_of_three_times_the_object_store_are_all_kept_or_counted(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(str(tmp_path / "chat"))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(NUM_LONG + NUM_KEPT):
            long = LONG if number % 9 else ""  # one in nine fits
            file.write(json.dumps({"pair_id": f"{number:05}", "prompt": f"red {number}", "chosen": "green" + long, "rejected": f"seven {number}"}) + "\n")
    assert (tmp_path / "rows.jsonl").stat().st_size > 3 * STORE_BYTES
    source = Source("train", (str(tmp_path / "rows.jsonl"),), RowKind.PAIR)
    report = tokenise_sources([source], chat_dir=tmp_path / "chat", out_dir=tmp_path / "tokens", limits=LIMITS)
    assert (report.num_kept, report.num_dropped) == ({"train": NUM_KEPT}, {"train": {"completion too long": NUM_LONG}})
