"""STUDY.md and its pictures, made from the study's rows alone. The same rows give the same files, which are then left untouched."""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from research.study import figures
from research.study.claims import LAST_EPOCH, MIN_SEEDS, Finding, findings, rank_agreement
from research.study.grid import PAPERS_BSR, VARIANTS, WORLDS, Cell
from research.study.rows import Row
from research.study.statistics import Figure as RowFigure
from research.study.statistics import Interval, between_twins, over_seeds
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report.figures import STYLE, scenario_label
from rm_robust.runs.storage.commits import write_text_atomic

INTRODUCTION = f"""# The paper's claims, re-tested at a small scale

Made by `make study` from study/results.jsonl; do not edit. What was asked: do the claims of Hong et al. (ICML 2025, arXiv 2505.07271) on Bradley-Terry (BT)
and batch-wise sum-to-zero regularisation (BSR) hold for models of about 1 M parameters that a laptop can train? Small models say little about large ones:
a claim that is not seen here is not refuted, and one that is seen was seen on simpler text than the paper's.

**How.** One world and seed at a time: a language model is trained from scratch on the world's own demonstrations, then every objective trains a reward model
from that one checkpoint, with the same head and the same batches in the same order (controlled twins), for {LAST_EPOCH} epochs with a learning rate that
falls linearly to zero, measured after each. Seeds change the initial weights and the order, in the embedded world the text too. A language
model that is lost is made again, and comes out the same: in the embedded world's seed 1, rows of two makings were run once more from a third (commit 70d5a24,
30 November 2026), and all their figures were equal to the last bit.

- **embedded**: the project's own world, whose gold scores are computed; tau-b over four completions of a prompt (accuracy in-domain). See README.
- **rmb**: real conversations, answers of strong models, labels as published (RMB-Reward-Model-Benchmark). Pairs only, so every scenario is an accuracy.
  Response-disjoint and mutual-disjoint pairs have a completion of the mistral family, unseen in training, on at least one side. The pairs of a scenario are
  the same for all seeds: intervals are over seeds, and say nothing of other pairs. Longer pairs are dropped and counted.

**Objectives.** `bt`, `hinge` (margin 1), `bt_norm`, `bt_dr`, `centering` (0.01), BSR with effective coefficient 0.03, 0.1 and 1 over the whole step, and
`bsr_micro`, the released code's (1e-3 x 16 on the mean of every 16 pairs). Where BSR must be one of them
it is `{PAPERS_BSR}`: the paper's 1e-3 at its batch of 128 is 0.128 by this project's default scaling; by the paper's printed formula it is far less.

**Verdicts.** Each claim is put as a number that is above 0 if the claim holds here. Its 95 % interval is Student's t over seeds, of differences between twins
where two objectives are compared. *reproduced*: the whole interval is above 0. *contradicted*: it is below. *not seen at this scale*: neither. Fewer than
{MIN_SEEDS} seeds: no verdict. With some fifty verdicts at 95 % two or three may be chance.
"""


def write_document(path: Path, rows: Sequence[Row], missing: Sequence[Cell]) -> bool:
    """Write `path` and the pictures in the folder study/ beside it. Returns whether anything changed."""
    pictures = _pictures(rows)
    parts = [INTRODUCTION, _state(rows, missing), "## Claims", _claims_table(findings(rows))]
    for world in WORLDS:
        own = [row for row in rows if row.part == "reward_model" and row.world == world]
        if own:
            parts += [
                f"## {_capitalised(figures.WORLD_TITLES[world])}",
                _data_sentence(own),
                _scenario_table(own, world),
                _epoch_table(own, world),
            ]
            parts += [
                f"![{caption}](study/{name}.png)" for name, (caption, _) in pictures.items() if name.endswith(world)
            ]
    policies = [row for row in rows if row.part == "rloo"]
    if policies:
        parts += ["## Policies", _policy_table(policies), f"![{pictures['gold_by_kl'][0]}](study/gold_by_kl.png)"]
    folder = path.parent / "study"
    folder.mkdir(parents=True, exist_ok=True)
    changed = [_write_bytes(folder / f"{name}.png", content) for name, (_, content) in pictures.items()]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return any(changed)
    write_text_atomic(path, text)
    return True


def _pictures(rows: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """By file name: caption and PNG."""
    with matplotlib.rc_context(STYLE):
        drawn: dict[str, tuple[str, Figure | None]] = {}
        for world in WORLDS:
            title = figures.WORLD_TITLES[world]
            drawn[f"scenarios_{world}"] = (f"The four scenarios, {title}", figures.scenarios(rows, world))
            drawn[f"epochs_{world}"] = (f"BT and BSR by epoch, {title}", figures.by_epoch(rows, world))
            drawn[f"dispersion_{world}"] = (
                f"Hidden norms over training, {title}",
                figures.dispersion_over_training(rows, world),
            )
        drawn["gold_by_kl"] = ("Gold score against KL", figures.gold_by_kl(rows))
        return {name: (caption, _png(figure)) for name, (caption, figure) in drawn.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _write_bytes(path: Path, content: bytes) -> bool:
    if path.exists() and path.read_bytes() == content:
        return False
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return True


def _capitalised(title: str) -> str:
    return title[:1].upper() + title[1:]


def _state(rows: Sequence[Row], missing: Sequence[Cell]) -> str:
    hours = sum(row.seconds for row in rows) / 3600
    longest = max((row.seconds for row in rows), default=0) / 60
    bases = {
        (row.world, row.seed, float(row.about["base_seconds"])) for row in rows
    }  # one that was lost was made again
    two_cores = hours - sum(row.seconds for row in rows if row.part == "reward_model") / 2 / 3600
    done = f"{len(rows)} runs of {hours:.1f} hours together, {two_cores:.1f} of two cores (reward models run two at a time, on a core each), the longest "
    done += f"{longest:.1f} minutes; beside them {len(bases)} language models with their data, {sum(seconds for *_, seconds in bases) / 3600:.1f} hours."
    if not missing:
        return done
    counts: dict[str, int] = {}
    for cell in missing:
        counts[f"{cell.part} on {cell.world}"] = counts.get(f"{cell.part} on {cell.world}", 0) + 1
    return f"{done} **Not complete**: missing are {', '.join(f'{count} of {name}' for name, count in counts.items())}."


def _claims_table(found: Sequence[Finding]) -> str:
    lines = [
        "| claim | the paper | here: above 0 if so | world | mean [95 % interval] | seeds | verdict |",
        "| --- " * 7 + "|",
    ]
    last = None
    for finding in found:
        claim = finding.claim
        head = f"{claim.title} | {claim.paper} | {claim.what}" if claim is not last else " | | "
        last = claim
        seeds = finding.interval.num_seeds if finding.interval else 0
        lines.append(
            f"| {head} | {finding.world} | {_shown(finding.interval, signed=True)} | {seeds} | {finding.verdict} |"
        )
    return "\n".join(lines)


def _scenario_table(rows: Sequence[Row], world: str) -> str:
    head = [
        f"After {LAST_EPOCH} epochs: mean over seeds [95 % interval]; below it the difference to `bt`, twin by twin.",
        "",
    ]
    lines = [
        *head,
        "| objective | seeds | " + " | ".join(map(scenario_label, SCENARIOS)) + " |",
        "| --- " * (2 + len(SCENARIOS)) + "|",
    ]
    for variant in VARIANTS:
        seeds = sum(row.variant == variant for row in rows)
        if not seeds:
            continue
        own = [over_seeds(rows, world, variant, _agreement(LAST_EPOCH, scenario)) for scenario in SCENARIOS]
        lines.append(f"| {variant} | {seeds} | " + " | ".join(map(_shown, own)) + " |")
        if variant != "bt":
            against = [
                between_twins(rows, world, variant, "bt", _agreement(LAST_EPOCH, scenario)) for scenario in SCENARIOS
            ]
            lines.append("| | | " + " | ".join(_shown(interval, signed=True) for interval in against) + " |")
    return "\n".join(lines)


def _epoch_table(rows: Sequence[Row], world: str) -> str:
    """Means only: the picture has the intervals."""
    lines = [
        "By epoch, means over seeds:",
        "",
        "| objective | epoch | " + " | ".join(map(scenario_label, SCENARIOS)) + " | training |",
        "| --- " * (3 + len(SCENARIOS)) + "|",
    ]
    for variant in VARIANTS:
        if not any(row.variant == variant for row in rows):
            continue
        for epoch in range(1, LAST_EPOCH + 1):
            own = [over_seeds(rows, world, variant, _agreement(epoch, scenario)) for scenario in SCENARIOS]
            training = over_seeds(rows, world, variant, partial(_training_accuracy, epoch=epoch))
            cells = ["-" if interval is None else f"{interval.mean:.3f}" for interval in (*own, training)]
            lines.append(f"| {variant if epoch == 1 else ''} | {epoch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _data_sentence(rows: Sequence[Row]) -> str:
    def counted(name: str) -> str:
        kept, dropped = ({int(row.about[f"num_{name}{suffix}"]) for row in rows} for suffix in ("", "_dropped"))
        return f"{name.replace('_', '-')} {_range(kept)} ({_range(dropped)})"

    sets = f"Kept, and in brackets dropped (too long, mostly): {', '.join(map(counted, ('train', *SCENARIOS)))}."
    refused, cases = (
        {int(row.figures[f"rm_bench/{name}"]) for row in rows if f"rm_bench/{name}" in row.figures}
        for name in ("num_refused", "num_cases")
    )
    bench = (
        f" RM-Bench: {_range(refused)} of {_range(cases)} prompts do not fit the model and are left out."
        if refused
        else ""
    )
    return f"{sets}{bench} Minutes a run: {_range({round(row.seconds / 60, 1) for row in rows})}."


def _policy_table(rows: Sequence[Row]) -> str:
    names = {
        "gold_score_mean_last": "gold, last tenth", "proxy_score_mean_last": "proxy, last tenth", "kl_mean_last": "KL (nats)",
        "evaluation_win_rate": "win rate against SFT", "evaluation_length_controlled_win_rate": "at equal length",
        "evaluation_completion_tokens_mean": "tokens", "num_overoptimised_steps": "steps the monitor called over-optimised",
    }  # fmt: skip
    lines = [
        "RLOO on the embedded world against each reward model:",
        "",
        "| reward model | seed | " + " | ".join(names.values()) + " |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row.variant, row.seed)):
        lines.append(
            f"| {row.variant} | {row.seed} | " + " | ".join(f"{row.figures[name]:.3f}" for name in names) + " |"
        )
    return "\n".join(lines)


def _training_accuracy(row: Row, *, epoch: int) -> float | None:
    return row.figures.get(f"{epoch}/train/accuracy")


def _agreement(epoch: int, scenario: str) -> RowFigure:
    return lambda row: rank_agreement(row, epoch, scenario)


def _shown(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.4f}"
    return f"{mean} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]" if interval.num_seeds > 1 else mean


def _range(values: set[int] | set[float]) -> str:
    return f"{min(values)}" if len(values) == 1 else f"{min(values)} to {max(values)}"
