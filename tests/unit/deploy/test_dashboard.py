"""The Grafana dashboard asks for metrics that exist.

tests/e2e/test_smoke.py compares the metrics of training with a real run. tests/component/test_cluster_metrics.py
compares all names that Ray exports with a real node's endpoint.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rm_robust.runs.trackers import PREFIX, RayMetricsSink, gauge_name
from serve.metrics import ModelMetrics, ServiceMetrics

DASHBOARD = json.loads(Path("deploy/grafana_dashboard.json").read_text())
FROM_RAY = {
    "ray_cluster_active_nodes",
    "ray_cluster_pending_nodes",
    "ray_node_cpu_utilization",
    "ray_object_store_memory",
}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?(?:rm_robust|cluster|node|object)_[a-z0-9_]+", expression))


def test_every_panel_has_a_place_and_names_its_metrics() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    positions = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(positions) == len(set(positions))
    assert all(names_in(expression) for expression in expressions())


def test_what_it_asks_the_scoring_service_for_the_service_says() -> None:
    metrics = ServiceMetrics()
    known = {family.name for family in metrics._registry.collect()}
    asked = {name for expression in expressions() for name in names_in(expression) if "{service=" in expression}
    assert asked
    assert {re.sub("_(total|bucket)$", "", name).removeprefix("ray_") for name in asked} <= known


def test_everything_of_this_project_has_the_one_prefix() -> None:
    names = {name for expression in expressions() for name in names_in(expression)}
    assert names
    assert {name for name in names if not name.startswith("ray_")} == set()


def test_the_services_metrics_are_copied_for_ray_name_by_name_with_their_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    class FakeGauge:
        def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.tag_keys)
            written[self.name, frozenset(tags.items())] = value

    monkeypatch.setattr("serve.metrics.RayGauge", FakeGauge)
    metrics = ServiceMetrics()
    ModelMetrics(metrics, "proxy").batch(num_items=3, num_tokens=40, fill=0.4, seconds=0.03)
    copy = metrics.copy_for_ray("mine")
    copy.write()
    metrics.answered("handle", 429, seconds=0.01, reason="overloaded")
    metrics.answered("handle", 429, seconds=0.01, reason="overloaded")
    copy.write()

    def value(name: str, **labels: str) -> float:
        return written[name, frozenset({**labels, "service": "mine"}.items())]

    assert value("rm_robust_tokens_total", model="proxy") == 40
    assert [value("rm_robust_batch_seconds_bucket", model="proxy", le=le) for le in ("0.02", "0.05", "+Inf")] == [
        0,
        1,
        1,
    ]
    assert value("rm_robust_requests_total", route="handle", status="429") == 2
    assert value("rm_robust_refusals_total", route="handle", reason="overloaded") == 2
    assert {
        f"{name}{{{','.join(sorted(key for key, _ in labels if key != 'service'))}}}" for name, labels in written
    } == {
        f"{sample.name}{{{','.join(sorted(sample.labels))}}}"
        for family in metrics._registry.collect()
        for sample in family.samples
    }


def test_what_it_asks_ray_for_ray_exports() -> None:
    asked = {
        name
        for expression in expressions()
        for name in names_in(expression)
        if name.startswith("ray_") and not name.startswith(f"ray_{PREFIX}")
    }
    assert asked == FROM_RAY
    import ray

    sources = "".join(path.read_text() for path in (Path(ray.__file__).parent / "dashboard").rglob("*.py"))
    for name in asked - {"ray_object_store_memory"}:  # this one comes from the raylet, which is compiled
        assert name.removeprefix("ray_") in sources


def test_gauges_have_one_prefix_the_run_and_the_latest_value(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, tuple[float, dict[str, str]]] = {}

    class FakeGauge:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            written[self.name] = (value, tags)

    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    sink = RayMetricsSink("mine")
    sink.write(3, {"rloo/gold_score_mean": 0.25, "time/generate_s": 1.5, "throughput/tokens_per_s": 10})
    sink.write(4, {"rloo/gold_score_mean": 0.5, "time/generate_s": 2.5})
    assert written == {
        "rm_robust_rloo_gold_score_mean": (0.5, {"run": "mine"}),
        "rm_robust_rloo_time_generate_s": (2.5, {"run": "mine"}),
        "rm_robust_rloo_throughput_tokens_per_s": (10.0, {"run": "mine"}),
        "rm_robust_rloo_step": (4.0, {"run": "mine"}),
    }
    assert gauge_name("rloo/reward/my-rule_mean") == "rm_robust_rloo_reward_my_rule_mean"
