"""A stage's metrics as gauges of Ray's own Prometheus endpoint, which every node has: `ray_rm_robust_<area>_<name>{run, …}`, the latest value.

Ray puts `ray_` before every name. The scoring service's metrics (serve/metrics.py) are there too, by `service`; deploy/grafana_dashboard.json draws both.
"""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "rm_robust_"
NAMES = re.compile(r"[^a-zA-Z0-9_]")


class RayMetricsSink:
    """Gauges of one stage of one run; a gauge that is not written to any more goes with the process."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        area = next((key.partition("/")[0] for key in metrics if not key.startswith(("time/", "throughput/"))), "run")
        for key, value in {**metrics, f"{area}/step": step}.items():
            name = gauge_name(key if not key.startswith(("time/", "throughput/")) else f"{area}_{key}")
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=key, tag_keys=("run",))
            self._gauges[name].set(float(value), tags=self._tags)

    def close(self) -> None:
        """The last values stay until the process ends."""


def gauge_name(key: str) -> str:
    """`rloo/gold_score_mean` is `rm_robust_rloo_gold_score_mean`, to which Ray adds `ray_`."""
    return PREFIX + NAMES.sub("_", key)
