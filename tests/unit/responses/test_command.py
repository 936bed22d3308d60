"""generate_responses refuses what cannot work before it reads or generates anything."""

from pathlib import Path

import pytest
import torch

from pipelines.command import main

CONFIG = ["--config", "pipelines/configs/responses/tiny.toml"]


def test_inside_a_ray_job_a_relative_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(Path(CONFIG[1]).absolute())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["generate-responses", "--config", config, "--out", "runs/mine"]) == 2
    assert (
        "--out runs/mine is relative, and a Ray job's working directory is an unpacked copy that vanishes with the job"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_labelling_on_a_gpu_that_this_machine_has_not_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["generate-responses", *CONFIG, "--out", str(out), "--set", "labels.device=cuda"]) == 2
    error = capsys.readouterr().err
    assert 'labels.device = "cuda" cannot be used: this process, on ' in error
    assert "has no CUDA. Start it on a machine with a GPU" in error
    assert 'or set labels.device = "cpu", or labels.url' in error
    assert not out.exists()
