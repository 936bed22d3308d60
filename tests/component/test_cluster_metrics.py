"""A real Ray node's Prometheus endpoint has every metric that deploy/grafana_dashboard.json asks for.

These are the gauges of training, and the metrics of a service without HTTP.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import pytest
import ray
import ray.serve as ray_serve
from prometheus_client.parser import text_string_to_metric_families

from rm_robust.cluster.environment import free_port
from rm_robust.data.world.corpus import distinct_prompts
from rm_robust.errors import ScoringError
from rm_robust.runs.trackers import RayMetricsSink
from rm_robust.scoring.contract import ScoreInput
from serve.cluster_scorer import ClusterScorer
from serve.keys import new_key
from serve.launch import deploy_inside, start_serve_without_http
from serve.settings import ModelSettings, ServiceSettings

EXPRESSIONS = re.findall(r'"expr": "(.*)"', Path("deploy/grafana_dashboard.json").read_text())
OF_TRAINING = {name for text in EXPRESSIONS for name in re.findall(r"ray_rm_robust_\w+(?=\{run=)", text)}
OF_SERVING = {name for text in EXPRESSIONS for name in re.findall(r"ray_rm_robust_\w+(?=\{service=)", text)}
EXPORTED_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Yield the metrics endpoint of a Ray that exports its metrics every second."""
    ray_dir, port = tempfile.mkdtemp(prefix="rs"), free_port("127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": ray_dir,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=ray_dir,
            _metrics_export_port=port,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        try:
            yield f"http://127.0.0.1:{port}/metrics"
        finally:
            ray_serve.shutdown()
            ray.shutdown()
    shutil.rmtree(ray_dir, ignore_errors=True)


def samples_at(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return the labels and value of each series by its name; nothing while the endpoint is not up."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        text = httpx.get(url, timeout=5, trust_env=False).text
    except httpx.TransportError:
        return samples
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def keys_of_training() -> dict[str, float]:
    """Return the key in metrics.jsonl of each name that the dashboard asks for, except the number of a stage's step."""
    keys = {}
    for name in OF_TRAINING:
        area, rest = re.fullmatch(r"ray_rm_robust_(sft|reward_model|rloo)_(\w+)", name).groups()  # type: ignore[union-attr]
        kind, _, name_in_kind = rest.partition("_")
        if rest != "step":
            keys[f"{area} {kind}/{name_in_kind}" if kind in ("time", "throughput") else f"{area} {area}/{rest}"] = 0.5
    return keys


def test_the_endpoint_has_every_name_that_the_dashboard_asks_for(endpoint: str) -> None:
    assert len(OF_TRAINING) > 15
    assert len(OF_SERVING) == 6
    for area in ("sft", "reward_model", "rloo"):
        values = {
            key.partition(" ")[2]: value for key, value in keys_of_training().items() if key.startswith(f"{area} ")
        }
        RayMetricsSink("mine").write(7, dict(sorted(values.items())))
    start_serve_without_http()
    judge = ModelSettings(model_name="gold", embedded_judge=True, num_cpus=0.1)
    deploy_inside(ServiceSettings(models=(judge,), api_keys=(new_key("run")[1],)), app_name="mine", deadline_s=60)
    scorer = ClusterScorer("mine", "gold")
    prompt = next(distinct_prompts(Random(0)))
    scorer.score([ScoreInput(prompt=prompt, completions=["Blue.", "Seven."])])
    with pytest.raises(ScoringError):
        ClusterScorer("mine", "nobody").score([ScoreInput(prompt=prompt, completions=["Blue."])])

    deadline_s = time.monotonic() + EXPORTED_WITHIN_S
    wanted = OF_TRAINING | OF_SERVING | {"ray_node_cpu_utilization", "ray_object_store_memory"}
    while missing := wanted - (samples := samples_at(endpoint)).keys():
        assert time.monotonic() < deadline_s, f"not on {endpoint} after {EXPORTED_WITHIN_S:g} s: {sorted(missing)}"
        time.sleep(0.5)
    for name in OF_TRAINING:
        [(labels, value)] = samples[name]
        assert (labels["run"], value) == ("mine", 7 if name.endswith("_step") else 0.5), name
    for name in OF_SERVING:
        assert {labels["service"] for labels, _ in samples[name]} == {"mine"}, name
    answered = {(labels["route"], labels["status"]): value for labels, value in samples["ray_rm_robust_requests_total"]}
    assert answered == {("handle", "200"): 1, ("handle", "404"): 1}
    assert [value for _, value in samples["ray_rm_robust_scores"]] == [2]
