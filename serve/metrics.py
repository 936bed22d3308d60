"""The metrics of a service: each front has a registry, which /metrics shows in Prometheus' text format.

Ray's own metrics endpoint has a copy of them, so a service without HTTP has metrics too.
"""

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from ray.util.metrics import Gauge as RayGauge
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rm_robust.scoring.contract import ERROR_HEADER
from serve.work import Scored

QUANTILES = (0.5, 0.9, 0.99)
NUM_RECENT = 4096
"""The number of last requests over which the latency quantiles are taken."""
BATCH_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
REQUEST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FILL = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0)


disable_created_metrics()  # type: ignore[no-untyped-call]


class RecentLatencies(Collector):
    """The latency quantiles of the last NUM_RECENT requests of each route, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = {}

    def add(self, route: str, seconds: float) -> None:
        self._seconds.setdefault(route, deque(maxlen=NUM_RECENT)).append(seconds)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "rm_robust_request_latency_seconds",
            f"Latency of the last {NUM_RECENT} requests.",
            labels=("route", "quantile"),
        )
        for route, seconds in self._seconds.items():
            ordered = sorted(seconds)
            for quantile in QUANTILES:
                family.add_metric((route, str(quantile)), ordered[min(len(ordered) - 1, int(quantile * len(ordered)))])
        yield family


class ScoreMoments(Collector):
    """The running mean and standard deviation of the raw scores of each model and checkpoint (Welford 1962)."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, str], tuple[int, float, float]] = {}

    def add(self, scored: Scored) -> None:
        key = (scored.served.model, scored.served.checkpoint)
        count, mean, squares = self._moments.get(key, (0, 0.0, 0.0))
        for result in scored.results:
            for score in result.scores:
                count += 1
                delta = score - mean
                mean += delta / count
                squares += delta * (score - mean)
        self._moments[key] = (count, mean, squares)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ("model", "checkpoint")
        counts = GaugeMetricFamily("rm_robust_scores", "Scores given since the start.", labels=labels)
        means = GaugeMetricFamily("rm_robust_score_mean", "Mean of those scores.", labels=labels)
        deviations = GaugeMetricFamily("rm_robust_score_std", "Standard deviation of those scores.", labels=labels)
        for key, (count, mean, squares) in self._moments.items():
            counts.add_metric(key, count)
            means.add_metric(key, mean)
            deviations.add_metric(key, (squares / count) ** 0.5)
        yield from (counts, means, deviations)


class RayCopy:
    """Copies a registry's samples to gauges of Ray's endpoint.

    The names are the same, except that Ray adds `ray_`, and each sample has the label `service`. Counters and buckets
    are gauges there, because `rate` and `histogram_quantile` ask for no type. A copy every few seconds costs requests
    nothing.
    """

    def __init__(self, registry: CollectorRegistry, service: str) -> None:
        self._registry, self._service = registry, service
        self._gauges: dict[str, RayGauge] = {}

    def write(self) -> None:
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name not in self._gauges:
                    self._gauges[sample.name] = RayGauge(
                        sample.name, description=family.documentation, tag_keys=(*sample.labels, "service")
                    )
                self._gauges[sample.name].set(sample.value, tags={**sample.labels, "service": self._service})


class ServiceMetrics:
    """Everything that one front counts. A call through a handle counts as a request of the route `handle`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rm_robust_requests", "HTTP requests answered.", ("route", "status"), registry=self._registry
        )
        self.refusals = Counter(
            "rm_robust_refusals", "Requests without scores, by reason.", ("route", "reason"), registry=self._registry
        )
        self.cancelled = Counter(
            "rm_robust_cancelled", "Requests whose client went away before the reply.", registry=self._registry
        )
        self.seconds = Histogram(
            "rm_robust_request_seconds", "Time to answer.", ("route",), buckets=REQUEST_SECONDS, registry=self._registry
        )
        self.queued_requests = Gauge(
            "rm_robust_queued_requests", "Requests waiting or being scored.", ("model",), registry=self._registry
        )
        self.queued_tokens = Gauge(
            "rm_robust_queued_tokens",
            "Tokens of the requests that wait or are being scored.",
            ("model",),
            registry=self._registry,
        )
        self.batch_items = Histogram(
            "rm_robust_batch_items", "Inputs of a batch.", ("model",), buckets=BATCH_ITEMS, registry=self._registry
        )
        self.batch_fill = Histogram(
            "rm_robust_batch_fill",
            "Tokens of a batch over max_batch_tokens.",
            ("model",),
            buckets=FILL,
            registry=self._registry,
        )
        self.batch_seconds = Histogram(
            "rm_robust_batch_seconds",
            "Time of a batch to a replica and back.",
            ("model",),
            buckets=BATCH_SECONDS,
            registry=self._registry,
        )
        self.batches_lost = Counter(
            "rm_robust_batches_lost",
            "Batches that came back without scores.",
            ("model", "reason"),
            registry=self._registry,
        )
        self.tokens = Counter(
            "rm_robust_tokens", "Tokens scored; a prompt counts once per request.", ("model",), registry=self._registry
        )
        self.latencies, self.scores = RecentLatencies(), ScoreMoments()
        self._registry.register(self.latencies)
        self._registry.register(self.scores)

    def answered(self, route: str, status: int, *, seconds: float, reason: str | None) -> None:
        """Count one answered request. `reason` is why it has no scores, None if it has."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)
        self.latencies.add(route, seconds)
        if reason is not None:
            self.refusals.labels(route, reason).inc()

    def copy_for_ray(self, service: str) -> RayCopy:
        return RayCopy(self._registry, service)

    def text(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class ModelMetrics:
    """The metrics that one model's queue reports."""

    def __init__(self, service: ServiceMetrics, model: str) -> None:
        self._service, self._model = service, model
        self._queued = service.queued_requests.labels(model), service.queued_tokens.labels(model)
        self._batch = (
            service.batch_items.labels(model),
            service.batch_fill.labels(model),
            service.batch_seconds.labels(model),
        )
        self._tokens = service.tokens.labels(model)

    def queue(self, num_requests: int, num_tokens: int) -> None:
        self._queued[0].set(num_requests)
        self._queued[1].set(num_tokens)

    def batch(self, *, num_items: int, num_tokens: int, fill: float, seconds: float) -> None:
        for histogram, value in zip(self._batch, (num_items, fill, seconds), strict=True):
            histogram.observe(value)
        self._tokens.inc(num_tokens)

    def batch_lost(self, reason: str) -> None:
        self._service.batches_lost.labels(self._model, reason).inc()

    def scored(self, scored: Scored) -> None:
        self._service.scores.add(scored)


class CountRequests:
    """ASGI middleware that counts and times every request by its route. A path without a route counts as `other`."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope["root_path"])
        route, started_s = path if path in self._routes else "other", time.perf_counter()

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reason = Headers(raw=message["headers"]).get(ERROR_HEADER)
                self._metrics.answered(route, message["status"], seconds=time.perf_counter() - started_s, reason=reason)
            await send(message)

        await self._app(scope, receive, count_and_send)
