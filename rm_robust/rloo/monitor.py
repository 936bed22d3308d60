"""Detect over-optimisation: over a window of steps the proxy score rises while the gold score does not rise, or falls.

Gao et al. 2023, figure 1. The window is the last `window_steps` steps that have a gold score, with the proxy scores of
the same steps. A rise is the mean over the second half of the window minus the mean over the first half (when the
number of steps is odd, the middle one is in neither half). Its unit is the standard deviation of the first step's
scores across completions. A rise is "not by chance" when it is at least its standard error times the quantile of
Student's t distribution that flat scores exceed in a fraction MAX_CHANCE of their windows. The rule holds in either of
two cases:

    the proxy rises by min_proxy_rise or more, not by chance,      (the proxy rose by an amount that matters,
    and gold rises by max_gold_rise at most                        and the judge sees no improvement)

    gold falls by min_gold_fall or more, not by chance,            (the judge sees the policy get worse; any rise of the
    and the proxy rises                                            proxy counts, as a weak one may have little left)

When the rule begins to hold, the monitor *fires*: it logs one warning and takes the configured action. It fires again
after `window_steps` more scored steps at the earliest. No step therefore counts for two firings, and a rule that holds
on and off for a while is one episode.

Simulations with the default settings: of 3,000 flat runs of 60 steps, 1.8 % fire with 8 completions a step, 1.0 % with
32, and one run with 128. Of 1,000 runs with 128 completions a step, all fire when the proxy rises by 0.4 deviations per
half window and gold is flat, or when the proxy rises by 0.04 and gold falls by 0.2.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pvariance

from scipy.stats import t as student

from rm_robust.config.rloo import MonitorConfig
from rm_robust.runs.metrics import read_metrics

logger = logging.getLogger(__name__)

MAX_CHANCE = 0.001
"""Probability that the noise of a flat score counts as a rise in one window."""


@dataclass(frozen=True)
class _ScoredStep:
    step: int
    proxy_mean: float
    gold_mean: float


class OveroptimisationMonitor:
    """Decides from the scores of a run whether it is over-optimised.

    Its state depends on nothing but the scores so far: `resume` and uninterrupted observation end in the same state.
    """

    def __init__(self, settings: MonitorConfig) -> None:
        self.settings = settings
        self.is_overoptimised = False
        """True while the rule holds for the last window."""
        self.num_firings = 0
        self._window: deque[_ScoredStep] = deque(maxlen=settings.window_steps)
        self._proxy_unit = 0.0
        self._gold_unit = 0.0
        self._num_scored_since_firing = settings.window_steps
        self._min_standard_errors = float(student.isf(MAX_CHANCE, degrees_of_freedom(settings.window_steps)))

    @property
    def learning_rate_factor(self) -> float:
        """Return the factor for the next step's learning rate; 1 unless the action is "lower_learning_rate"."""
        return (
            self.settings.learning_rate_factor**self.num_firings
            if self.settings.action == "lower_learning_rate"
            else 1.0
        )

    @property
    def must_stop(self) -> bool:
        """Return whether the run ends here; this stays true when the run is resumed with the same settings."""
        return self.settings.action == "stop" and self.num_firings > 0

    def observe(
        self, step: int, *, proxy_mean: float, proxy_std: float, gold_mean: float | None, gold_std: float | None
    ) -> dict[str, float]:
        """Take the scores of one step: means and standard deviations across its completions.

        `step` is the number of steps done, as in metrics.jsonl. Returns the metrics of the window; empty while the
        window is not full, and at a step without gold scores (both None). Logs a warning when the monitor fires.
        """
        num_firings = self.num_firings
        metrics = self._take(step, proxy_mean, proxy_std, gold_mean, gold_std)
        if self.num_firings > num_firings:
            logger.warning(
                "RLOO step %d: OVER-OPTIMISATION. From the first to the second half of the %d scored steps %d to %d "
                "the mean proxy score rose by %.2f (standard error %.2f), the mean gold score by %.2f (%.2f), in "
                "standard deviations of the first step's scores. %s",
                step,
                len(self._window),
                self._window[0].step,
                step,
                metrics["rloo/monitor/proxy_rise"],
                metrics["rloo/monitor/proxy_rise_se"],
                metrics["rloo/monitor/gold_rise"],
                metrics["rloo/monitor/gold_rise_se"],
                self._action_in_words(),
            )
        return metrics

    def resume(self, run_dir: Path, first_step: int) -> None:
        """Take the scores of steps 1 to `first_step` from metrics.jsonl, without warnings; call it before `observe`."""
        assert not self._window, "resume comes before the first observation"
        for line in read_metrics(run_dir, "rloo"):
            if int(line["step"]) <= first_step and "rloo/gold_score_mean" in line:
                proxy_mean, proxy_std = float(line["rloo/proxy_score_mean"]), float(line["rloo/proxy_score_std"])
                self._take(
                    int(line["step"]),
                    proxy_mean,
                    proxy_std,
                    float(line["rloo/gold_score_mean"]),
                    float(line["rloo/gold_score_std"]),
                )

    def _take(
        self, step: int, proxy_mean: float, proxy_std: float, gold_mean: float | None, gold_std: float | None
    ) -> dict[str, float]:
        assert (gold_mean is None) == (gold_std is None), (
            f"step {step}: gold mean {gold_mean} with gold deviation {gold_std}"
        )
        if gold_mean is None or gold_std is None:
            return {}
        self._window.append(_ScoredStep(step, proxy_mean, gold_mean))
        self._num_scored_since_firing += 1
        self._proxy_unit = self._proxy_unit or proxy_std  # the first step whose scores are not all equal
        self._gold_unit = self._gold_unit or gold_std
        if len(self._window) < self.settings.window_steps or not self._proxy_unit or not self._gold_unit:
            return {}
        proxy_rise, proxy_rise_se = (
            value / self._proxy_unit for value in rise_with_error([scored.proxy_mean for scored in self._window])
        )
        gold_rise, gold_rise_se = (
            value / self._gold_unit for value in rise_with_error([scored.gold_mean for scored in self._window])
        )
        min_rise = max(self.settings.min_proxy_rise, self._min_standard_errors * proxy_rise_se)
        min_fall = max(self.settings.min_gold_fall, self._min_standard_errors * gold_rise_se)
        has_risen_alone = proxy_rise >= min_rise and gold_rise <= self.settings.max_gold_rise
        self.is_overoptimised = has_risen_alone or (proxy_rise > 0 and -gold_rise >= min_fall)
        if self.is_overoptimised and self._num_scored_since_firing >= self.settings.window_steps:
            self.num_firings += 1
            self._num_scored_since_firing = 0
        return {
            "rloo/monitor/proxy_rise": proxy_rise,
            "rloo/monitor/proxy_rise_se": proxy_rise_se,
            "rloo/monitor/gold_rise": gold_rise,
            "rloo/monitor/gold_rise_se": gold_rise_se,
            "rloo/overoptimised": float(self.is_overoptimised),
        }

    def _action_in_words(self) -> str:
        if self.settings.action == "stop":
            return 'The run stops here (rloo.monitor.action = "stop").'
        if self.settings.action == "lower_learning_rate":
            return f"The learning rate of all later steps is multiplied by {self.learning_rate_factor:g}."
        return (
            'Training goes on unchanged (rloo.monitor.action = "warn"). A higher rloo.kl_coefficient keeps the policy '
            "nearer to the text that the reward model knows."
        )


def rise_with_error(means: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the second half minus the mean of the first, and its standard error; needs at least 3 values.

    The noise of one step is estimated from the differences of successive values about their mean, so that a steady
    trend adds nothing to it (von Neumann et al. 1941): its variance is half the variance of x[i+1] - x[i]. The
    difference of two means of h steps has 2/h times that variance.
    """
    half = len(means) // 2
    step_variance = pvariance([after - before for before, after in pairwise(means)]) / 2
    return fmean(means[-half:]) - fmean(means[:half]), math.sqrt(2 * step_variance / half)


def degrees_of_freedom(num_means: int) -> float:
    """Return the degrees of freedom of the variance that `rise_with_error` estimates from n = `num_means` values.

    For independent normal values it is 2 E^2 / Var = 2 (n - 1)^2 / (3n - 4). Von Neumann et al. 1941.
    """
    return 2 * (num_means - 1) ** 2 / (3 * num_means - 4)
