"""Ray's object store, full of objects that others hold.

Ray spills to disk, and the pipeline still keeps or counts every row.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from rm_robust.data.pipeline import DataSource, tokenise_sources
from rm_robust.data.rows import RowKind
from rm_robust.data.token_rows import TokenLimits
from tests.support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

STORE_BYTES = 80 * 2**20
"""Size of the object store: about the smallest that Ray takes."""
HELD_BYTES = 20 * 2**20
NUM_HELD = 6
NUM_LONG, NUM_KEPT = 800, 4000
LIMITS = TokenLimits(max_prompt_tokens=60, max_completion_tokens=40, max_dropped_fraction=0.05)


@pytest.fixture(autouse=True)
def _small_store() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="warning", object_store_memory=STORE_BYTES
    )
    yield
    ray.shutdown()


def test_rows_are_all_kept_or_counted_beside_objects_of_more_than_the_store(tmp_path: Path) -> None:
    held = [ray.put(np.full(HELD_BYTES, number, dtype=np.uint8)) for number in range(NUM_HELD)]
    assert NUM_HELD * HELD_BYTES > STORE_BYTES, "some are on disk already"
    tiny_tokenizer().save_pretrained(str(tmp_path / "chat"))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(NUM_LONG + NUM_KEPT):
            long = " red" * 2000 if number % 6 == 5 else ""
            file.write(
                json.dumps(
                    {
                        "pair_id": f"{number:05}",
                        "prompt": f"red {number}",
                        "chosen": "green" + long,
                        "rejected": f"seven {number}",
                    }
                )
                + "\n"
            )
    source = DataSource("train", (str(tmp_path / "rows.jsonl"),), RowKind.PAIR)
    report = tokenise_sources([source], chat_dir=tmp_path / "chat", out_dir=tmp_path / "tokens", limits=LIMITS)
    assert (report.num_kept, report.num_dropped) == ({"train": NUM_KEPT}, {"train": {"completion too long": NUM_LONG}})
    for number, reference in enumerate(held):
        assert (ray.get(reference) == number).all()
