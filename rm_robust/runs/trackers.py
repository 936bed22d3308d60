"""Send a stage's metrics elsewhere too: to Ray's Prometheus endpoint, and to Weights & Biases and MLflow where
[tracking] says so.

On Ray's endpoint, which every node has, a metric is the gauge `ray_rm_robust_<area>_<name>{run, …}` with the latest
value; Ray puts `ray_` before every name. The scoring service's metrics (serve/metrics.py) are there too, by `service`;
deploy/grafana_dashboard.json draws both. Weights & Biases and MLflow get one run of theirs a stage. A resumed stage
goes on in the run that it began: both are found again by an identity made from the run directory and the stage.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_robust.config.run import PipelineConfig, TrackingConfig
from rm_robust.errors import ConfigError
from rm_robust.runs.metrics import MetricsSink
from rm_robust.runs.storage.copies import shown, uri_of

IDENTITY_TAG = "rm_robust.identity"
PREFIX = "rm_robust_"
NAMES = re.compile(r"[^a-zA-Z0-9_]")


def check_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError when a tracker is asked for whose package is not installed."""
    for name, wanted, package in (
        ("wandb_project", config.wandb_project, "wandb"),
        ("mlflow_experiment", config.mlflow_experiment, "mlflow"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.{name} = {wanted!r} needs the package {package}, which is not installed: pip install "
                "'rm-robust[trackers]'."
            )


def open_trackers(config: PipelineConfig, run_dir: Path, stage: str) -> list[MetricsSink]:
    """Return the trackers that the config asks for, and Ray's metrics. Only rank 0, which writes metrics, calls it."""
    identity = hashlib.sha256(f"{shown(run_dir)}/{stage}".encode()).hexdigest()[:32]
    sinks: list[MetricsSink] = []
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sinks.append(RayMetricsSink(config.name))
    if config.tracking.wandb_project:
        settings = config.model_dump(mode="json")
        sinks.append(
            WandbSink(
                config.tracking.wandb_project,
                name=f"{config.name}/{stage}",
                identity=identity,
                run_dir=run_dir,
                settings=settings,
            )
        )
    if config.tracking.mlflow_experiment:
        sinks.append(
            MlflowSink(
                config.tracking.mlflow_experiment,
                config.tracking.mlflow_uri,
                name=f"{config.name}/{stage}",
                identity=identity,
            )
        )
    return sinks


class WandbSink:
    """A run of Weights & Biases. It ignores steps up to its last one, which are done again after a kill."""

    def __init__(self, project: str, *, name: str, identity: str, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb

        # A file in the copy of a run in an object store would be deleted with the copy.
        folder = str(run_dir) if uri_of(run_dir) is None else None
        self._run = wandb.init(project=project, name=name, id=identity, resume="allow", dir=folder, config=settings)

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow."""

    def __init__(self, experiment: str, uri: str | None, *, name: str, identity: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known_experiment = self._client.get_experiment_by_name(experiment)
        experiment_id = (
            known_experiment.experiment_id if known_experiment else self._client.create_experiment(experiment)
        )
        runs = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1
        )
        run = runs[0] if runs else self._client.create_run(experiment_id, run_name=name, tags={IDENTITY_TAG: identity})
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        for key, value in metrics.items():
            self._client.log_metric(self._run_id, key, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class RayMetricsSink:
    """Ray gauges of one stage of one run. A gauge ends with the process that wrote it."""

    def __init__(self, run_name: str) -> None:
        from ray.util.metrics import Gauge  # training without Ray has no endpoint to send to

        self._tags = {"run": run_name}
        self._new_gauge = Gauge
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        area = next((key.partition("/")[0] for key in metrics if not key.startswith(("time/", "throughput/"))), "run")
        for key, value in {**metrics, f"{area}/step": step}.items():
            name = gauge_name(key if not key.startswith(("time/", "throughput/")) else f"{area}_{key}")
            if name not in self._gauges:
                self._gauges[name] = self._new_gauge(name, description=key, tag_keys=("run",))
            self._gauges[name].set(float(value), tags=self._tags)

    def close(self) -> None:
        """Do nothing: the last values stay until the process ends."""


def gauge_name(key: str) -> str:
    """Return the gauge of a metric: `rloo/gold_score_mean` is `rm_robust_rloo_gold_score_mean`. Ray adds `ray_`."""
    return PREFIX + NAMES.sub("_", key)
