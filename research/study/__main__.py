"""Re-test the paper's claims, and write docs/results/study.md.

The study trains reward models with several objectives, seeds and worlds, and RLOO policies against two of them.
A repeated command runs only what has no row in docs/results/study/results.jsonl yet. If no row is missing, it changes
nothing.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import ray
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from pipelines.driver import exit_code_of, repository_root
from research.study.document import write_document
from research.study.grid import FULL, QUICK, WORLDS, Cell, key_of
from research.study.rows import Row, read_rows, write_rows
from research.study.runs import real_data, run_cell
from rm_robust.cluster.log_lines import start_logging
from rm_robust.cluster.session import connect_to_ray
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import DataError, StudyError

logger = logging.getLogger(__name__)

RUNS_AT_A_TIME = 2
"""The number of reward models that train at the same time, one core each.

On two cores this is faster than training one after the other on both. An RLOO run takes both cores, so those runs go
one at a time.
"""


def main(description: str, arguments: list[str] | None = None) -> int:
    """Run the study and return the exit code: 2 for wrong data or settings, 130 when it was stopped."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use two objectives, two seeds and smaller worlds; write to runs/study_quick/, never to docs/",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of rmb_pairs.parquet and rm_bench.parquet"
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="default: both")
    parser.add_argument(
        "--max-minutes", type=float, help="start no further run after this time; 0 only writes the document"
    )
    parsed = parser.parse_args(arguments)
    start_logging()
    quieten_libraries()
    plan = QUICK if parsed.quick else FULL
    folder = Path("runs").absolute() / plan.name
    document = (folder if parsed.quick else repository_root() / "docs" / "results") / "study.md"
    results = document.parent / "study" / "results.jsonl"

    worlds = tuple(parsed.worlds)

    def work() -> None:
        configs = {cell: plan.config(cell, repository_root() / "pipelines" / "configs") for cell in plan.cells(WORLDS)}
        keys = {cell: key_of(cell, config) for cell, config in configs.items()}
        with only_one(folder):
            rows = read_rows(results)
            missing = [cell for cell, key in keys.items() if cell.world in worlds and key not in rows]
            if any(cell.world == "rmb" for cell in missing) and parsed.max_minutes != 0:
                require_same_data([row for row in rows.values() if row.world == "rmb"], real_data(parsed.data))
            for row in run_all(missing, configs, folder, parsed.data, max_minutes=parsed.max_minutes):
                rows[row.key] = row
                write_rows(results, rows)
            rows = read_rows(results)  # rounded, as the next call reads them
            every_key = set(keys.values())
            outdated = [row for key, row in rows.items() if key not in every_key]
            if outdated:
                logger.warning(
                    "%d rows of %s have other settings than this study and are left out (first: %s)",
                    len(outdated),
                    results,
                    outdated[0].cell,
                )
            known = [row for key, row in rows.items() if key in every_key]
            still_missing = [cell for cell, key in keys.items() if cell.world in worlds and key not in rows]
            changed = write_document(document, known, still_missing)
        outcome = "was rewritten" if changed else "is unchanged"
        print(f"{len(known)} rows, {len(still_missing)} missing; {document} {outcome}")

    try:
        return exit_code_of(work)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130


def run_all(
    cells: Sequence[Cell],
    configs: Mapping[Cell, PipelineConfig],
    folder: Path,
    data_dir: Path,
    *,
    max_minutes: float | None,
) -> Iterator[Row]:
    """Yield each row when its run is done, and start no run after `max_minutes`.

    Raises StudyError at the end of a part in which runs failed.
    """
    started = time.monotonic()

    def has_time() -> bool:
        return max_minutes is None or time.monotonic() - started < 60 * max_minutes

    if not cells or not has_time():
        return
    torch.set_num_threads(1)  # this process scores RM-Bench for several runs at the same time
    connect_to_ray()
    with tqdm(total=len(cells), desc="study", unit=" runs") as progress:
        for part, num_at_a_time in (("reward_model", RUNS_AT_A_TIME), ("rloo", 1)):
            for row in _run_part(
                [cell for cell in cells if cell.part == part], configs, folder, data_dir, num_at_a_time, has_time
            ):
                progress.update()
                yield row


def _run_part(
    waiting: list[Cell],
    configs: Mapping[Cell, PipelineConfig],
    folder: Path,
    data_dir: Path,
    num_at_a_time: int,
    has_time: Callable[[], bool],
) -> Iterator[Row]:
    pool = ThreadPoolExecutor(num_at_a_time, thread_name_prefix="study")
    running: dict[Future[Row], Cell] = {}
    failures: dict[Cell, BaseException] = {}
    try:
        while running or (waiting and has_time()):
            while waiting and len(running) < num_at_a_time and has_time():
                cell = waiting.pop(0)
                running[pool.submit(run_cell, cell, configs[cell], folder, data_dir)] = cell
            for run in wait(running, return_when=FIRST_COMPLETED).done:
                cell, failure = running.pop(run), run.exception()
                if failure is None:
                    yield run.result()
                else:
                    logger.error("%s failed: %s", cell, failure)
                    failures[cell] = failure
    except BaseException:
        ray.shutdown()  # ends the runs that still go on: the interpreter would wait for their threads
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        names = "; ".join(f"{cell}: {type(failure).__name__}: {failure}" for cell, failure in failures.items())
        raise StudyError(
            f"{len(failures)} runs failed; the rows of all others are kept. The same command tries them again. {names}"
        )


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the study's lock during the block. Raises StudyError while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StudyError(f"Another process is running the study in {folder}. Wait for it, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


def require_same_data(rows: Sequence[Row], sha256_of: Mapping[str, str]) -> None:
    """Raise DataError if a row was made with other files than those that `sha256_of` names."""
    for row in rows:
        for name, sha256 in sha256_of.items():
            earlier_sha256 = row.about[f"{name}_sha256"]
            if earlier_sha256 != sha256:
                raise DataError(
                    f"The row of {row.cell} was made with another {name} ({earlier_sha256}, now {sha256}). "
                    "Give the folder that it was made with."
                )


if __name__ == "__main__":
    sys.exit(main(str(__doc__)))
