"""Write study.md and its pictures from the study's rows alone.

The same rows give the same files, which are then left untouched.
"""

import io
import textwrap
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
from rm_robust.report.figure_style import STYLE
from rm_robust.report.reward_model_figures import scenario_label
from rm_robust.runs import files as run_files

PROSE_COLUMNS = 110

INTRODUCTION = f"""# The paper's claims, re-tested at a small scale

```
make study DATA=…    # does the runs that are missing, then writes this page; hours when all are
```

The command writes this page from study/results.jsonl; do not edit it. The question: do the claims of Hong et
al. (ICML 2025, arXiv 2505.07271) on Bradley-Terry (BT) and batch-wise sum-to-zero regularisation (BSR) hold
for models of about 1 M parameters that a laptop can train? Small models say little about large ones. A claim
that is not seen here is not refuted, and a claim that is seen here was seen on simpler text than the paper's.

**Method.** For each world and seed, one language model is trained from scratch on the world's own
demonstrations. Then every objective trains a reward model from that one checkpoint, with the same head and
the same batches in the same order (controlled twins). Training takes {LAST_EPOCH} epochs, with a learning
rate that falls linearly to zero, and the reward model is measured after each epoch. A seed sets the initial
weights and the order of the batches, and in the embedded world also the text. A language model that was lost
is trained again, and the result is the same: for seed 1 of the embedded world, rows from two such trainings
were run again on a third one (commit 70d5a24, 30 November 2026), and all their figures were equal to the last
bit.

- **embedded**: the project's own world, whose gold scores are computed (`rm_robust/data/world/`). The figure
  is tau-b over four completions of a prompt, and accuracy in-domain.
- **rmb**: real conversations with answers of strong models, labelled as published
  (RMB-Reward-Model-Benchmark). It has pairs only, so the figure is accuracy in every scenario. In
  response-disjoint and mutual-disjoint pairs, at least one completion comes from the mistral family, which
  training does not see. A scenario has the same pairs for all seeds: the intervals are over seeds, and say
  nothing about other pairs. Pairs that are too long are dropped and counted.

**Objectives.** `bt`, `hinge` (margin 1), `bt_norm`, `bt_dr`, `centering` (0.01), BSR with effective
coefficients 0.03, 0.1 and 1 over the whole step, and `bsr_micro`, which is BSR as in the released code
(1e-3 x 16 on the mean of every 16 pairs). Where one of them must stand for BSR, it is `{PAPERS_BSR}`: the
paper's 1e-3 at its batch of 128 is 0.128 by this project's default scaling, and far less by the paper's
printed formula.

**Verdicts.** Each claim is expressed as a number that is above 0 if the claim holds here. The number's 95 %
interval is Student's t over seeds; where two objectives are compared, it is over the differences between
twins. *reproduced*: the whole interval is above 0. *contradicted*: the whole interval is below 0. *not seen
at this scale*: neither. With fewer than {MIN_SEEDS} seeds there is no verdict. Of about fifty verdicts at
95 %, two or three may be chance.
"""


def write_document(path: Path, rows: Sequence[Row], missing: Sequence[Cell]) -> bool:
    """Write `path` and the pictures in the folder study/ beside it, and return whether anything changed."""
    pictures = _pictures(rows)
    parts = [INTRODUCTION, _state(rows, missing), "## Claims", _claims_table(findings(rows))]
    for world in WORLDS:
        world_rows = [row for row in rows if row.part == "reward_model" and row.world == world]
        if world_rows:
            parts += [
                f"## {_capitalised(figures.WORLD_TITLES[world])}",
                _data_sentence(world_rows),
                _scenario_table(world_rows, world),
                _epoch_table(world_rows, world),
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
    run_files.write_text(path, text)
    return True


def _pictures(rows: Sequence[Row]) -> dict[str, tuple[str, bytes]]:
    """Draw every picture, and return its caption and PNG by file name."""
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
    # The seconds are part of the key: a language model that was lost was trained again, and counts twice.
    bases = {(row.world, row.seed, float(row.about["base_seconds"])) for row in rows}
    base_hours = sum(seconds for *_, seconds in bases) / 3600
    two_cores = hours - sum(row.seconds for row in rows if row.part == "reward_model") / 2 / 3600
    done = (
        f"{len(rows)} runs took {hours:.1f} hours in total, or {two_cores:.1f} hours on two cores, because reward "
        f"models run two at a time, on one core each. The longest run took {longest:.1f} minutes. "
        f"The {len(bases)} language models and their data took another {base_hours:.1f} hours."
    )
    if not missing:
        return _wrapped(done)
    counts: dict[str, int] = {}
    for cell in missing:
        counts[f"{cell.part} on {cell.world}"] = counts.get(f"{cell.part} on {cell.world}", 0) + 1
    missing_runs = ", ".join(f"{count} of {name}" for name, count in counts.items())
    return _wrapped(f"{done} **Not complete.** These runs are missing: {missing_runs}.")


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, PROSE_COLUMNS, break_long_words=False, break_on_hyphens=False)


def _claims_table(all_findings: Sequence[Finding]) -> str:
    lines = [
        "| claim | the paper | number (above 0 if the claim holds) | world | mean [95 % interval] | seeds | verdict |",
        "| --- " * 7 + "|",
    ]
    last = None
    for finding in all_findings:
        claim = finding.claim
        head = f"{claim.title} | {claim.paper} | {claim.quantity}" if claim is not last else " | | "
        last = claim
        seeds = finding.interval.num_seeds if finding.interval else 0
        lines.append(
            f"| {head} | {finding.world} | {_shown(finding.interval, signed=True)} | {seeds} | {finding.verdict} |"
        )
    return "\n".join(lines)


def _scenario_table(rows: Sequence[Row], world: str) -> str:
    head = [
        f"After {LAST_EPOCH} epochs: mean over seeds [95 % interval], below it the difference to `bt`, twin by twin.",
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
        means = [over_seeds(rows, world, variant, _agreement(LAST_EPOCH, scenario)) for scenario in SCENARIOS]
        lines.append(f"| {variant} | {seeds} | " + " | ".join(map(_shown, means)) + " |")
        if variant != "bt":
            differences = [
                between_twins(rows, world, variant, "bt", _agreement(LAST_EPOCH, scenario)) for scenario in SCENARIOS
            ]
            lines.append("| | | " + " | ".join(_shown(interval, signed=True) for interval in differences) + " |")
    return "\n".join(lines)


def _epoch_table(rows: Sequence[Row], world: str) -> str:
    """Return a table of the means by epoch. The picture shows the intervals."""
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
            held_out = [over_seeds(rows, world, variant, _agreement(epoch, scenario)) for scenario in SCENARIOS]
            training = over_seeds(rows, world, variant, partial(_training_accuracy, epoch=epoch))
            cells = ["-" if interval is None else f"{interval.mean:.3f}" for interval in (*held_out, training)]
            lines.append(f"| {variant if epoch == 1 else ''} | {epoch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _data_sentence(rows: Sequence[Row]) -> str:
    def counted(name: str) -> str:
        kept, dropped = ({int(row.about[f"num_{name}{suffix}"]) for row in rows} for suffix in ("", "_dropped"))
        return f"{name.replace('_', '-')} {_range(kept)} ({_range(dropped)})"

    counts = ", ".join(map(counted, ("train", *SCENARIOS)))
    sets = f"Rows kept, and in brackets rows dropped (mostly because they are too long): {counts}."
    refused, cases = (
        {int(row.figures[f"rm_bench/{name}"]) for row in rows if f"rm_bench/{name}" in row.figures}
        for name in ("num_refused", "num_cases")
    )
    bench = (
        f" RM-Bench: {_range(refused)} of {_range(cases)} prompts do not fit the model and are left out."
        if refused
        else ""
    )
    minutes = _range({round(row.seconds / 60, 1) for row in rows})
    return _wrapped(f"{sets}{bench} Minutes per run: {minutes}.")


def _policy_table(rows: Sequence[Row]) -> str:
    names = {
        "gold_score_mean_last": "gold, last tenth",
        "proxy_score_mean_last": "proxy, last tenth",
        "kl_mean_last": "KL (nats)",
        "evaluation_win_rate": "win rate against SFT",
        "evaluation_length_controlled_win_rate": "at equal length",
        "evaluation_completion_tokens_mean": "tokens",
        "num_overoptimised_steps": "steps the monitor called over-optimised",
    }
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
