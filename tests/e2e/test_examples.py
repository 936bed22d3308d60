"""Each example runs as its docstring says, and prints what it promises."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rm_robust.models.checkpoint import read_manifest
from tests.e2e.conftest import Launcher, SmokeRun
from tests.e2e.pipeline_process import REPOSITORY, RUN_DEADLINE_S
from tests.support.notebook import code_of
from tests.support.serve_process import serve_process

pytestmark = pytest.mark.timeout(RUN_DEADLINE_S + 120)

EXAMPLES = REPOSITORY / "examples"


def printed_by(launcher: Launcher, script: Path, *arguments: object, folder: Path = REPOSITORY) -> str:
    """Run a script in `folder`, and return what it printed."""
    command = ["env", f"--chdir={folder}", "MPLBACKEND=agg", sys.executable, str(script), *map(str, arguments)]
    running = launcher.command(*command)
    assert running.wait() == 0, running.output()[-4000:]
    return running.output()


def scored_lines(output: str) -> list[tuple[float, str]]:
    """Return the lines that consist of a score and a completion."""
    return [(float(score), text) for score, text in re.findall(r"^ +(-?\d+\.\d{3})  (.+)$", output, re.MULTILINE)]


def test_scores_in_this_process_come_best_first(smoke_run: SmokeRun, launcher: Launcher) -> None:
    lines = scored_lines(printed_by(launcher, EXAMPLES / "01_score_in_process.py", smoke_run.run_dir))
    assert len(lines) == 4
    assert "The answer is pear." in dict(map(reversed, lines))
    assert [score for score, _ in lines] == sorted((score for score, _ in lines), reverse=True)


def test_scores_over_http_name_the_checkpoint_that_is_served(
    smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path
) -> None:
    checkpoint = smoke_run.run_dir / "checkpoints" / "reward_model"
    with serve_process(tmp_path, "--checkpoint", str(checkpoint), "--insecure-no-auth") as service:
        output = printed_by(launcher, EXAMPLES / "02_score_over_http.py", service.url)
    assert f"reward_model {read_manifest(checkpoint).content_sha256}\n" in output
    assert len(scored_lines(output)) == 4


@pytest.mark.slow
def test_a_reward_model_learns_the_pairs_that_the_script_writes(launcher: Launcher, tmp_path: Path) -> None:
    output = printed_by(launcher, EXAMPLES / "03_train_on_your_pairs.py", folder=tmp_path)
    evaluation = json.loads((tmp_path / "runs" / "own_pairs" / "evaluation.json").read_text())
    assert evaluation["in_domain"]["value"] > 0.9
    colour, number = json.loads(output.splitlines()[-1])
    assert colour > number


def test_a_comparison_prints_the_differences_from_the_twin(
    smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path
) -> None:
    output = printed_by(launcher, EXAMPLES / "04_compare_two_reward_models.py", smoke_run.run_dir, tmp_path)
    twin = read_manifest(smoke_run.run_dir / "bt_twin" / "checkpoints" / "reward_model").content_sha256
    _, differences = output.split(f"minus checkpoint {twin[:19]}")
    bsr, bt = (
        json.loads((tmp_path / name / "result.json").read_text())["figures"]["all.kendall_tau"]["value"]
        for name in ("bsr", "bt")
    )
    (printed,) = re.findall(r"^all\.kendall_tau +(\S+) .* p = [01]\.\d{3}$", differences, re.MULTILINE)
    assert float(printed) == pytest.approx(bsr - bt, abs=1e-4)
    assert (tmp_path / "bsr" / "report.html").is_file()


def test_best_of_n_prints_the_judges_score_for_each_n(smoke_run: SmokeRun, launcher: Launcher) -> None:
    output = printed_by(launcher, EXAMPLES / "05_best_of_n.py", smoke_run.run_dir)
    lines = re.findall(r"^best of +(\d+): gold score (\d\.\d{3})$", output, re.MULTILINE)
    assert [int(n) for n, _ in lines] == [1, 2, 4, 8, 16]
    assert all(0 <= float(gold) <= 1 for _, gold in lines)


def numbers_after(names: Sequence[str], output: str) -> list[float]:
    """Return the number of the one line that begins with each name."""
    return [float(re.findall(rf"^{name} +(-?\d\.\d+)$", output, re.MULTILINE)[0]) for name in names]


@pytest.mark.slow
def test_the_notebook_trains_serves_scores_and_compares(launcher: Launcher, tmp_path: Path) -> None:
    """Its code runs in a folder of that depth, because the notebook finds its run beside its own folder."""
    folder = tmp_path / "examples"
    folder.mkdir()
    program = folder / "tutorial.py"
    program.write_text(code_of(EXAMPLES / "tutorial.ipynb"))
    output = printed_by(launcher, program, folder=folder)
    for objective in ("BSR", "Bradley-Terry"):
        assert re.search(rf"^{objective} +in_domain 0\.\d+  .*mutual_disjoint -?0\.\d+$", output, re.MULTILINE)
    assert len(re.findall(r"^  score +-?\d+\.\d+  gold \d\.\d+  '", output, re.MULTILINE)) == 4
    random, twin, bsr, best = numbers_after(["random choice", "Bradley-Terry", "BSR", "best choice"], output)
    assert random < min(twin, bsr)
    assert max(twin, bsr) <= best
    assert os.listdir(tmp_path / "runs") == ["tutorial"]
