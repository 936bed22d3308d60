"""`pipelines/study.py`: run what is missing, keep its row, then make the document again.

plan ─cells, keys─► missing ─two at a time, base runs first─► rows ─► results.jsonl ─► STUDY.md, study/*.png
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from rm_robust.config import PipelineConfig
from rm_robust.errors import RmRobustError
from rm_robust.stages import connect_to_ray, repository_root
from rm_robust.study.document import write_document
from rm_robust.study.grid import FULL, QUICK, WORLDS, Cell, Plan, key_of
from rm_robust.study.rows import Row, read_rows, write_rows
from rm_robust.study.runs import prepare_base, run_cell
from rm_robust.worker_group import quieten_libraries

logger = logging.getLogger(__name__)

RUNS_AT_A_TIME = 2
"""Reward models, one core each: on two cores that is faster than one after the other on both. RLOO's parts take both, one run at a time."""


def main(description: str, arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 for wrong data or settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two objectives, two seeds, smaller worlds; written to runs/study_quick/, never to docs/")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of rmb_pairs.parquet and rm_bench.parquet")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="default: both")
    parser.add_argument("--max-minutes", type=float, help="begin no further run after so many; 0 only makes the document")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    quieten_libraries()
    plan = QUICK if parsed.quick else FULL
    folder = Path("runs").absolute() / plan.name
    document = folder / "STUDY.md" if parsed.quick else repository_root() / "docs" / "STUDY.md"
    results = document.parent / "study" / "results.jsonl"
    try:
        missing = run_missing(plan, tuple(parsed.worlds), results, folder=folder, data_dir=parsed.data, max_minutes=parsed.max_minutes)
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = _rows_of(plan, read_rows(results))
    changed = write_document(document, list(rows.values()), missing)
    print(f"{len(rows)} rows, {len(missing)} missing; {document} {'made anew' if changed else 'is as it was'}")
    return 0


def run_missing(plan: Plan, worlds: tuple[str, ...], results: Path, *, folder: Path, data_dir: Path, max_minutes: float | None) -> list[Cell]:
    """Run what has no row in `results`, which gets each row when its run is done. Returns the cells, of all worlds, that still have none."""
    configs = {cell: plan.config(cell, repository_root() / "pipelines" / "configs") for cell in plan.cells(WORLDS)}
    keys = {cell: key_of(cell, config) for cell, config in configs.items()}
    rows = read_rows(results)
    wanted = [cell for cell in plan.cells(worlds) if keys[cell] not in rows]
    started = time.monotonic()

    def has_time() -> bool:
        return max_minutes is None or time.monotonic() - started < 60 * max_minutes

    if wanted and has_time():
        connect_to_ray()
        progress = tqdm(total=len(wanted), desc=plan.name, unit=" runs")
        for row in _run_all(wanted, configs, folder, data_dir, has_time):
            rows[row.key] = row
            write_rows(results, rows)
            progress.update()
        progress.close()
    current = set(keys.values())
    outdated = [row for key, row in rows.items() if key not in current]
    if outdated:
        logger.warning("%d rows of %s are of other settings than the study's now, and are left out (first: %s)", len(outdated), results, outdated[0].cell.name)
    return [cell for cell, key in keys.items() if key not in rows]


def _run_all(cells: Sequence[Cell], configs: dict[Cell, PipelineConfig], folder: Path, data_dir: Path, has_time: Callable[[], bool]) -> Iterator[Row]:
    """Rows as their runs are done. An error ends the study once the runs under way are done; their rows are kept."""
    for part, num_at_a_time in (("reward_model", RUNS_AT_A_TIME), ("rloo", 1)):
        waiting = [cell for cell in cells if cell.part == part]
        with ThreadPoolExecutor(num_at_a_time, thread_name_prefix="study") as pool:
            under_way: set[Future[Row]] = set()
            failure: BaseException | None = None
            while under_way or (waiting and failure is None and has_time()):
                while waiting and failure is None and len(under_way) < num_at_a_time and has_time():
                    cell = waiting.pop(0)
                    prepare_base(cell, configs[cell], folder, data_dir)  # here, so that no two threads make the same one
                    logger.info("begin %s", cell.name)
                    under_way.add(pool.submit(run_cell, cell, configs[cell], folder, data_dir))
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for run in done:
                    failure = failure or run.exception()
                    if run.exception() is None:
                        yield run.result()
            if failure is not None:
                raise failure


def _rows_of(plan: Plan, rows: dict[str, Row]) -> dict[str, Row]:
    configs_dir = repository_root() / "pipelines" / "configs"
    keys = [key_of(cell, plan.config(cell, configs_dir)) for cell in plan.cells(WORLDS)]
    return {key: rows[key] for key in keys if key in rows}
