"""Report the rounds of the scoring bench: a table for each model, and the figures of the last line."""

from dataclasses import dataclass, field
from statistics import median

from research.bench.load_client import LoadResult
from research.bench.scoring_figures import percentile, ratio_of_rounds
from research.bench.scoring_servers import OPENRLHF, OURS, OURS_NO_SHARING, VLLM, VLLM_CACHING


@dataclass
class Measured:
    """The measurements of one server, with one value for each round."""

    label: str
    requests_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_ms_per_request: list[float] = field(default_factory=list)
    others_cores: list[float] = field(default_factory=list)
    """The CPU cores that the idle servers together kept busy meanwhile."""
    largest_difference: float = 0.0

    def add(self, result: LoadResult, process_id: int, largest_difference: float) -> None:
        latencies_ms = [1000 * seconds for group in result.latencies_s for seconds in group]
        self.requests_per_s.append(len(latencies_ms) / result.seconds)
        self.p50_ms.append(percentile(latencies_ms, 50))
        self.p99_ms.append(percentile(latencies_ms, 99))
        self.cpu_ms_per_request.append(1000 * result.server_cpu_s[process_id] / len(latencies_ms))
        self.others_cores.append((sum(result.server_cpu_s.values()) - result.server_cpu_s[process_id]) / result.seconds)
        self.largest_difference = max(self.largest_difference, largest_difference)


def print_table(title: str, measured: dict[str, Measured]) -> None:
    peer = measured[OPENRLHF]
    print(
        f"\n| {title} | requests/s, median (range) | ratio | p50 ms | p99 ms | p99, ratio "
        "| CPU ms a request | idle servers meanwhile, cores | largest difference of a score |\n" + "| --- " * 9 + "|"
    )
    for server in measured.values():
        speeds = server.requests_per_s
        speed = f"{median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
        ratio, p99_ratio = ratio_of_rounds(speeds, peer.requests_per_s), ratio_of_rounds(server.p99_ms, peer.p99_ms)
        print(
            f"| {server.label} | {speed} | {ratio:.2f} | {median(server.p50_ms):.0f} | {median(server.p99_ms):.0f} "
            f"| {p99_ratio:.2f} | {median(server.cpu_ms_per_request):.1f} | {median(server.others_cores):.2f} "
            f"| {server.largest_difference:.0e} |"
        )
    print(flush=True)


def figures_of(size: str, measured: dict[str, Measured]) -> dict[str, float]:
    """Return the figures of the last line.

    Ratios are ours over the other's: more is better for requests/s, and less is better for p99.
    """
    ours, peer = measured[OURS], measured[OPENRLHF]
    without_sharing = measured.get(OURS_NO_SHARING, ours)
    figures = {
        "ours": median(ours.requests_per_s),
        "peer": median(peer.requests_per_s),
        "ratio": ratio_of_rounds(ours.requests_per_s, peer.requests_per_s),
        "p99_ratio": ratio_of_rounds(ours.p99_ms, peer.p99_ms),
        "ratio_no_sharing": ratio_of_rounds(without_sharing.requests_per_s, peer.requests_per_s),
        "vllm_ratio_caching_on": ratio_of_rounds(ours.requests_per_s, measured[VLLM_CACHING].requests_per_s),
        "vllm_ratio_caching_off": ratio_of_rounds(without_sharing.requests_per_s, measured[VLLM].requests_per_s),
        "cpu_ms_per_request": median(ours.cpu_ms_per_request),
        "peer_cpu_ms_per_request": median(peer.cpu_ms_per_request),
    }
    return {f"{name}_{size}": round(value, 3) for name, value in figures.items()}
