"""What the scoring bench reports of its rounds: a table for each model, and the figures of its last line."""

from dataclasses import dataclass, field
from statistics import median

from research.bench.load_client import LoadResult
from research.bench.scoring_figures import percentile, ratio_of_rounds
from research.bench.scoring_servers import OPENRLHF, OURS, OURS_NO_SHARING, VLLM, VLLM_CACHING


@dataclass
class Measured:
    """Of one server: one value a round."""

    label: str
    requests_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_ms_per_request: list[float] = field(default_factory=list)
    others_cores: list[float] = field(default_factory=list)
    """CPU cores that the idle servers together kept busy meanwhile."""
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
    print(f"\n| {title} | requests/s, median (range) | ratio | p50 ms | p99 ms | p99, ratio "
          "| CPU ms a request | idle servers meanwhile, cores | largest difference of a score |\n" + "| --- " * 9 + "|")  # fmt: skip
    for own in measured.values():
        speed = f"{median(own.requests_per_s):.0f} ({min(own.requests_per_s):.0f}-{max(own.requests_per_s):.0f})"
        ratios = ratio_of_rounds(own.requests_per_s, peer.requests_per_s), ratio_of_rounds(own.p99_ms, peer.p99_ms)
        print(f"| {own.label} | {speed} | {ratios[0]:.2f} | {median(own.p50_ms):.0f} | {median(own.p99_ms):.0f} | {ratios[1]:.2f} | "
              f"{median(own.cpu_ms_per_request):.1f} | {median(own.others_cores):.2f} | {own.largest_difference:.0e} |")  # fmt: skip
    print(flush=True)


def figures_of(size: str, measured: dict[str, Measured]) -> dict[str, float]:
    """Ratios are ours to the other's: of requests/s (more is better), and of p99 (less is better)."""
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
