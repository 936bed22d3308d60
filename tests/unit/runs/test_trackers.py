"""Trackers get every metric of a stage. Recorders of our calls stand in for their packages, which are not installed.

Tried by hand with wandb 0.31.0 (offline) and mlflow-skinny 3.17.2 (file store): every value arrived, and a resumed
stage went on in the same run.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ConfigError
from rm_robust.runs.metrics import MetricsWriter
from rm_robust.runs.trackers import IDENTITY_TAG, check_trackers, open_trackers


def config_of(**tracking: str) -> PipelineConfig:
    return PipelineConfig.model_validate({"name": "test", "seed": 3, "tracking": tracking})


class Recorder:
    """Stand in for a library's client. `answers` says, by method name, what a call returns."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self.answers.get(name)

        return call


def install_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Make `import name` give a module with these members."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def write_two_steps(config: PipelineConfig, run_dir: Path) -> None:
    with MetricsWriter(run_dir, "sft", 0, sinks=open_trackers(config, run_dir, "sft")) as writer:
        writer.write(1, {"sft/loss": 2.0})
        writer.write(2, {"sft/loss": 1.5, "time/step_s": 0.1})


def test_wandb_gets_every_metric_in_one_run_that_a_resumed_stage_finds_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, inits = Recorder(), []

    def init(**settings: Any) -> Recorder:
        inits.append(settings)
        return run

    install_module(monkeypatch, "wandb", init=init)
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        write_two_steps(config_of(wandb_project="robust"), folder)
    assert run.calls[:3] == [
        ("log", ({"sft/loss": 2.0},), {"step": 1}),
        ("log", ({"sft/loss": 1.5, "time/step_s": 0.1},), {"step": 2}),
        ("finish", (), {}),
    ]
    assert (inits[0]["project"], inits[0]["name"], inits[0]["resume"], inits[0]["config"]["seed"]) == (
        "robust",
        "test/sft",
        "allow",
        3,
    )
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_mlflow_gets_every_metric_in_one_run_that_a_resumed_stage_finds_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_resumed: bool
) -> None:
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    client = Recorder(create_experiment="e1", search_runs=[run] if is_resumed else [], create_run=run)
    uris = []
    install_module(monkeypatch, "mlflow", MlflowClient=lambda tracking_uri: uris.append(tracking_uri) or client)
    write_two_steps(config_of(mlflow_experiment="robust", mlflow_uri="http://127.0.0.1:5000"), tmp_path)
    calls = {name: (args, kwargs) for name, args, kwargs in client.calls}
    assert uris == ["http://127.0.0.1:5000"]
    assert IDENTITY_TAG in calls["search_runs"][1]["filter_string"]
    assert ("create_run" in calls) == (not is_resumed)
    logged = [(*args, kwargs["step"]) for name, args, kwargs in client.calls if name == "log_metric"]
    assert logged == [("r1", "sft/loss", 2.0, 1), ("r1", "sft/loss", 1.5, 2), ("r1", "time/step_s", 0.1, 2)]
    assert client.calls[-1] == ("set_terminated", ("r1",), {})


@pytest.mark.parametrize(("setting", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, setting: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(config_of().tracking)
    with pytest.raises(ConfigError, match=f"tracking.{setting} = 'robust' needs the package {package}.*pip install"):
        check_trackers(config_of(**{setting: "robust"}).tracking)


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    assert open_trackers(config_of(), tmp_path, "sft") == []
