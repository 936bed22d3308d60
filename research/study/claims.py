"""The paper's claims (Hong et al., ICML 2025), each with a number that tests it here and a verdict that follows a rule.

A verdict is `reproduced` if the whole 95 % interval over seeds lies on the claimed side of 0, `contradicted` if the
whole interval lies on the other side, and otherwise `not seen at this scale`. Fewer than MIN_SEEDS seeds give no
verdict. Each verdict judges one number at 95 %, without a correction for the number of verdicts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from research.study.grid import PAPERS_BSR
from research.study.rows import Row
from research.study.statistics import Figure, Interval, between_twins, over_seeds

MIN_SEEDS = 3
LAST_EPOCH = 3
MARGIN_OF_EQUALITY = 0.005
"""The largest loss of accuracy that counts as no loss. The paper's own in-domain gains are of this size."""
MOST_OF_HEAD_NORM = 0.05
"""The relative change of the head's norm below which the norm "stays"."""
DISJOINT = ("prompt_disjoint", "response_disjoint", "mutual_disjoint")
Measure = Callable[[Iterable[Row], str], Interval | None]
"""A function that takes all rows and the name of a world, and returns the interval of a claim's number."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and a number that is above 0 if the statement holds here."""

    title: str
    paper: str
    """What the paper reports, and where."""
    quantity: str
    """What the number measures, in words. The number is above 0 if the claim holds."""
    measure: Measure
    worlds: tuple[str, ...] = ("embedded", "rmb")
    part: str = "reward_model"


@dataclass(frozen=True)
class Finding:
    """The result of one claim in one world."""

    claim: Claim
    world: str
    interval: Interval | None

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return "not run"
        if self.interval.num_seeds < MIN_SEEDS:
            return f"no verdict: {self.interval.num_seeds} seeds"
        return {1: "reproduced", -1: "contradicted", 0: "not seen at this scale"}[self.interval.sign]


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Return a finding for every claim in every world that the claim applies to."""
    return [
        Finding(claim, world, claim.measure([row for row in rows if row.part == claim.part], world))
        for claim in CLAIMS
        for world in claim.worlds
    ]


def rank_agreement(row: Row, epoch: int, scenario: str) -> float | None:
    """Return Kendall's tau-b if the scenario consists of rankings, accuracy if it consists of pairs."""
    tau = row.figures.get(f"{epoch}/{scenario}/kendall_tau_b")
    return row.figures.get(f"{epoch}/{scenario}/accuracy") if tau is None else tau


def dispersion(row: Row, where: str) -> float | None:
    """Return standard deviation / mean of the hidden norm before the final norm.

    `where` has the form <epoch>/<scenario or train>.
    """
    std, mean = row.figures.get(f"{where}/hidden_norm_std"), row.figures.get(f"{where}/hidden_norm_mean")
    return None if std is None or mean is None else std / mean


def _value(row: Row, name: str) -> float | None:
    return row.figures.get(name)


def _change(row: Row, figure: str, first: str, last: str) -> float | None:
    return _difference(row, f"{last}/{figure}", f"{first}/{figure}")


def _difference(row: Row, figure: str, other: str) -> float | None:
    value, subtracted = row.figures.get(figure), row.figures.get(other)
    return None if value is None or subtracted is None else value - subtracted


def _mean_disjoint(row: Row, epoch: int) -> float | None:
    values = [rank_agreement(row, epoch, scenario) for scenario in DISJOINT]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _rise(row: Row, scenario: str, metric: str) -> float | None:
    """Return how much the metric rises from the end of the first epoch to the end of the last one."""
    return _change(row, f"{scenario}/{metric}", "1", str(LAST_EPOCH))


def _ahead_in_domain(row: Row) -> float | None:
    """Return how much more accuracy rises in-domain than on mutual-disjoint.

    Both values are accuracy over pairs, whatever else a scenario reports.
    """
    in_domain, mutual_disjoint = (_rise(row, scenario, "accuracy") for scenario in ("in_domain", "mutual_disjoint"))
    return None if in_domain is None or mutual_disjoint is None else in_domain - mutual_disjoint


def _fall(row: Row, scenario: str) -> float | None:
    first, last = rank_agreement(row, 1, scenario), rank_agreement(row, LAST_EPOCH, scenario)
    return None if first is None or last is None else first - last


def _dispersion_change(row: Row) -> float | None:
    first, last = dispersion(row, "0/train"), dispersion(row, f"{LAST_EPOCH}/train")
    return None if first is None or last is None else last - first


def _rank_growth(row: Row) -> float | None:
    """Return the effective rank on mutual-disjoint minus that on prompt-disjoint, at the end.

    The paper subtracts training from evaluation. Both sets here have equally many completions and only unseen prompts;
    the response models are unseen in the first and known in the second.
    """
    return _difference(row, f"{_END}mutual_disjoint/effective_rank", f"{_END}prompt_disjoint/effective_rank")


def _norm_shift(row: Row) -> float | None:
    """Return the relative change, without sign, of the mean hidden norm from prompt-disjoint to mutual-disjoint."""
    unseen, known = (
        row.figures.get(f"{_END}{scenario}/hidden_norm_mean") for scenario in ("mutual_disjoint", "prompt_disjoint")
    )
    return None if unseen is None or known is None else abs(unseen / known - 1)


def _largest_leap(row: Row) -> float | None:
    kl = row.curves["kl_mean"]
    return max((later - earlier for earlier, later in zip(kl, kl[5:], strict=False)), default=None)


def _head_norm_stays(row: Row) -> float | None:
    change, first = _change(row, "head_norm", "0/train", f"{LAST_EPOCH}/train"), row.figures.get("0/train/head_norm")
    return None if change is None or first is None else MOST_OF_HEAD_NORM - abs(change) / first


def _of(variant: str, figure: Figure) -> Measure:
    return lambda rows, world: over_seeds(rows, world, variant, figure)


def _between(variant: str, other: str, figure: Figure) -> Measure:
    return lambda rows, world: between_twins(rows, world, variant, other, figure)


def _shifted(measure: Measure, by: float) -> Measure:
    def shifted(rows: Iterable[Row], world: str) -> Interval | None:
        interval = measure(rows, world)
        if interval is None:
            return None
        return Interval(interval.mean + by, interval.low + by, interval.high + by, interval.num_seeds)

    return shifted


_END = f"{LAST_EPOCH}/"
_RM_BENCH = ("rmb",)
_POLICY = ("embedded",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "BT drives the hidden states of a pair apart",
        "mean of ‖h_w - h_l‖ grows over training (Fig. 2)",
        "BT: change of ‖h_w - h_l‖ after the final norm, first 5 % of steps to the last epoch",
        _of("bt", partial(_change, figure="final_hidden_distance_mean", first="0/train", last=f"{LAST_EPOCH}/train")),
    ),
    Claim(
        "… and the more so for some pairs than for others",
        "the variance of ‖h_w - h_l‖ grows too (Fig. 2)",
        "BT: change of the standard deviation of ‖h_w - h_l‖ after the final norm, "
        "first 5 % of steps to the last epoch",
        _of("bt", partial(_change, figure="final_hidden_distance_std", first="0/train", last=f"{LAST_EPOCH}/train")),
    ),
    Claim(
        "… with a tail of large distances",
        "the distribution of ‖h_w - h_l‖ becomes right-skewed (Fig. 2)",
        "BT: change of the skewness of ‖h_w - h_l‖ within a batch, first 5 % of steps to the last epoch",
        _of(
            "bt", partial(_change, figure="final_hidden_distance_skewness", first="0/train", last=f"{LAST_EPOCH}/train")
        ),
    ),
    Claim(
        "BT disperses hidden norms",
        "the paper blames the excessive growth of the norms' variance (section 4.1)",
        "BT: change of std / mean of ‖h‖ before the final norm, first 5 % of steps to the last epoch",
        _of("bt", _dispersion_change),
    ),
    Claim(
        "The head's norm hardly moves",
        "‖W_p‖ stays about 1 (Fig. 1)",
        f"BT: {MOST_OF_HEAD_NORM} minus the relative change of ‖W_p‖, first 5 % of steps to the last epoch",
        _of("bt", _head_norm_stays),
    ),
    Claim(
        "BSR disperses hidden norms less than BT, in-domain",
        "narrower boxes of the norms (Fig. 3)",
        "BT minus BSR, std / mean of ‖h‖ before the final norm on in-domain completions, at the end",
        _between("bt", PAPERS_BSR, partial(dispersion, where=f"{_END}in_domain")),
    ),
    Claim(
        "… and on unseen prompts and models",
        "the same, most of all out of distribution (Fig. 3)",
        "BT minus BSR, the same on mutual-disjoint completions",
        _between("bt", PAPERS_BSR, partial(dispersion, where=f"{_END}mutual_disjoint")),
    ),
    Claim(
        "BT over-optimises: in-domain outruns mutual-disjoint",
        "accuracy on D_train and D_ID rises while the disjoint sets stagnate or fall (section 3)",
        "BT: rise of accuracy over pairs in-domain minus its rise on mutual-disjoint, end of epoch 1 to end of epoch 3",
        _of("bt", _ahead_in_domain),
    ),
    Claim(
        "… in-domain rises with further epochs",
        "the same",
        "BT: rise of accuracy in-domain, end of epoch 1 to end of epoch 3",
        _of("bt", partial(_rise, scenario="in_domain", metric="accuracy")),
    ),
    *(
        Claim(
            f"… {scenario.replace('_', '-')} falls with further epochs",
            "stagnates or falls (section 3); only a fall is tested",
            f"BT: fall of {scenario.replace('_', '-')}, end of epoch 1 to end of epoch 3",
            _of("bt", partial(_fall, scenario=scenario)),
        )
        for scenario in DISJOINT
    ),
    Claim(
        "BSR does not cost in-domain accuracy",
        "equal or better by up to .0045 (Table 5; .0002 below in one of four)",
        f"BSR minus BT, in-domain, at the end, plus {MARGIN_OF_EQUALITY}",
        _shifted(
            _between(PAPERS_BSR, "bt", partial(rank_agreement, epoch=LAST_EPOCH, scenario="in_domain")),
            MARGIN_OF_EQUALITY,
        ),
    ),
    *(
        Claim(
            f"BSR is better than BT on {scenario.replace('_', '-')}",
            f"tau-b higher in all four models, {gains} (Table 5)",
            f"BSR minus BT, {scenario.replace('_', '-')}, at the end",
            _between(PAPERS_BSR, "bt", partial(rank_agreement, epoch=LAST_EPOCH, scenario=scenario)),
        )
        for scenario, gains in zip(DISJOINT, (".001 to .023", ".002 to .021", ".001 to .024"), strict=True)
    ),
    Claim(
        "BSR is better than hinge",
        "in all four models on mutual-disjoint (Table 5)",
        "BSR minus hinge, mutual-disjoint, at the end",
        _between(PAPERS_BSR, "hinge", partial(rank_agreement, epoch=LAST_EPOCH, scenario="mutual_disjoint")),
    ),
    Claim(
        "DR is worse than BT",
        "in all four models and all four sets (Table 5)",
        "BT minus DR, mean of the three disjoint sets, at the end",
        _between("bt", "bt_dr", partial(_mean_disjoint, epoch=LAST_EPOCH)),
    ),
    Claim(
        "Norm is the worst: worse than DR",
        "in all four models and all four sets (Table 5)",
        "DR minus Norm, mean of the three disjoint sets, at the end",
        _between("bt_dr", "bt_norm", partial(_mean_disjoint, epoch=LAST_EPOCH)),
    ),
    Claim(
        "BT's effective rank grows more from known to unknown text than BSR's",
        "+10.42 against +0.14 (Table 1)",
        "BT minus BSR, effective rank on mutual-disjoint minus prompt-disjoint, at the end",
        _between("bt", PAPERS_BSR, _rank_growth),
    ),
    Claim(
        "BT's effective rank grows from known to unknown text",
        "23.34 to 33.76 (Table 1)",
        "BT: effective rank on mutual-disjoint minus prompt-disjoint, at the end",
        _of("bt", _rank_growth),
    ),
    Claim(
        "BT's norms shift on unseen models, BSR's do not",
        "BT's median moves by 0.7 % (Qwen) and 0.3 % (Llama), BSR's by less (Fig. 3)",
        "BT minus BSR, relative shift of the mean ‖h‖ from prompt-disjoint to mutual-disjoint",
        _between("bt", PAPERS_BSR, _norm_shift),
    ),
    Claim(
        "BT's probabilities are worse than BSR's",
        "growing score differences are over-confidence (section 4.1); the paper has no figure of calibration",
        "BT minus BSR, Brier score on mutual-disjoint, at the end",
        _between("bt", PAPERS_BSR, partial(_value, name=f"{_END}mutual_disjoint/brier")),
    ),
    Claim(
        "BSR does not cost RM-Bench overall",
        "70.1 and 70.2 (Table 2)",
        f"BSR minus BT, overall accuracy without math, plus {MARGIN_OF_EQUALITY}",
        _shifted(_between(PAPERS_BSR, "bt", partial(_value, name="rm_bench/overall.mean")), MARGIN_OF_EQUALITY),
        _RM_BENCH,
    ),
    Claim(
        "BSR is better than BT on RM-Bench's hard comparisons",
        "47.8 to 52.1 at 1e-3 (Table 2)",
        "BSR minus BT, hard accuracy, mean of chat, code and safety (math is not in the file)",
        _between(PAPERS_BSR, "bt", partial(_value, name="rm_bench/overall.hard")),
        _RM_BENCH,
    ),
    Claim(
        "… worse on its easy ones",
        "88.4 to 85.0 at 1e-3 (Table 2)",
        "BT minus BSR, easy accuracy",
        _between("bt", PAPERS_BSR, partial(_value, name="rm_bench/overall.easy")),
        _RM_BENCH,
    ),
    Claim(
        "… and the more so, the larger the coefficient",
        "hard 47.9, 52.1, 55.7 at 1e-4, 1e-3, 1e-2 (Table 2)",
        "BSR at effective coefficient 1.0 minus 0.03, hard accuracy",
        _between("bsr_1", "bsr_0.03", partial(_value, name="rm_bench/overall.hard")),
        _RM_BENCH,
    ),
    Claim(
        "In the second half, a policy trained against BT stagnates, and one trained against BSR does not",
        "gold score flat against BT in the last half (Fig. 5)",
        "BSR minus BT, gold's rise in the second half of the steps",
        _between(PAPERS_BSR, "bt", partial(_value, name="gold_rise_second_half")),
        _POLICY,
        "rloo",
    ),
    Claim(
        "KL leaps when a policy is trained against BT",
        "a leap between 0 and 7.5 nats before the score rises; smooth with BSR (Fig. 5)",
        "BT minus BSR, the largest rise of KL within five steps (nats)",
        _between("bt", PAPERS_BSR, _largest_leap),
        _POLICY,
        "rloo",
    ),
    Claim(
        "A policy trained against BSR keeps improving",
        "gold score rises to the end (Fig. 5)",
        "BSR: gold's rise in the second half",
        _of(PAPERS_BSR, partial(_value, name="gold_rise_second_half")),
        _POLICY,
        "rloo",
    ),
    Claim(
        "A policy trained against BSR ends higher by gold",
        "Fig. 5",
        "BSR minus BT, mean gold score of the last tenth of the steps",
        _between(PAPERS_BSR, "bt", partial(_value, name="gold_score_mean_last")),
        _POLICY,
        "rloo",
    ),
    Claim(
        "… and wins more often at equal length",
        "length-controlled win rate 9.02 against 8.41 (Table 3)",
        "BSR minus BT, length-controlled win rate against the SFT policy by gold on held prompts",
        _between(PAPERS_BSR, "bt", partial(_value, name="evaluation_length_controlled_win_rate")),
        _POLICY,
        "rloo",
    ),
    Claim(
        "… with shorter answers",
        "1337 against 2180 (Table 3)",
        "BT minus BSR, tokens of a completion to held prompts",
        _between("bt", PAPERS_BSR, partial(_value, name="evaluation_completion_tokens_mean")),
        _POLICY,
        "rloo",
    ),
)
