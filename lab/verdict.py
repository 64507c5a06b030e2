"""The statistics of a comparison: pure functions of losses and step times.

Order: Student's paired t-test with what belongs to it, Holm's correction for several tests, the
ratio of two step times, and last `judge`, which makes verdicts of them. Losses are in nats per
token, and a lower one is better.
"""

import math
from dataclasses import dataclass

import numpy as np

SIGNIFICANCE, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Difference:
    """The losses of an arm less those of the reference, paired by seed: below 0 the arm is better.

    The verdict is 'better', 'worse' or 'no difference detected'; where nothing can be tested it is
    'diverged' or 'one seed', and the numbers that do not exist are NaN."""

    verdict: str
    mean: float = math.nan
    low: float = math.nan  # 95% interval of the mean over seeds
    high: float = math.nan
    p: float = math.nan  # of the two-sided paired t-test, Holm-adjusted over the arms
    detectable: float = math.nan  # smallest true difference that such a test usually finds


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with `df` degrees of freedom, t >= 0.

    Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term, total = math.cos(angle) ** odd, 0.0
    for exponent in range(odd, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * (exponent + 1) / (exponent + 2)
    sine_part = math.sin(angle) * total
    return 2 / math.pi * (angle + sine_part) if odd else sine_part


def t_quantile(p: float, df: int) -> float:
    """The t with P(T < t) = p, for p from 0.5 to below 1, found by bisection."""
    low, high = 0.0, 1.0
    while t_inside(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_inside(middle, df) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return high


def mean_and_error(differences: list[float]) -> tuple[float, float]:
    """The mean of two or more numbers, and its standard error."""
    deviation = float(np.std(differences, ddof=1))
    return float(np.mean(differences)), deviation / math.sqrt(len(differences))


def paired_t_test(differences: list[float]) -> float:
    """Two-sided p of the hypothesis that the true mean of two or more differences is 0.

    Student 1908."""
    mean, error = mean_and_error(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 1 - t_inside(abs(mean) / error, len(differences) - 1)


def interval(differences: list[float]) -> tuple[float, float]:
    """The means that paired_t_test does not reject at 5%.

    With few seeds the interval of a bootstrap is too narrow (docs/LOG.md), so it is not one."""
    mean, error = mean_and_error(differences)
    reach = t_quantile(1 - SIGNIFICANCE / 2, len(differences) - 1) * error
    return mean - reach, mean + reach


def detectable(differences: list[float]) -> float:
    """The smallest true mean that the test at 5%, not adjusted, finds with 80% power if the
    differences spread as these do. Bloom 1995."""
    df = len(differences) - 1
    _, error = mean_and_error(differences)
    return (t_quantile(1 - SIGNIFICANCE / 2, df) + t_quantile(POWER, df)) * error


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values adjusted for there being several of them: the smallest of m times m, the next times
    m - 1, and so on, none below the one before it. Holm 1979."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = largest
    return adjusted


def time_ratio(seconds: list[float], reference: list[float]) -> tuple[float, float, float]:
    """(ratio, low, high): the median over rounds of seconds / reference, and its 95% bootstrap
    interval. Both times of a round are measured together, so drift cancels. Efron 1979."""
    ratios = np.divide(seconds, reference)
    resampled = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    medians = np.median(resampled, axis=1)
    low, high = np.quantile(medians, (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2))
    return float(np.median(ratios)), float(low), float(high)


def judge(reference: dict[int, float], arms: dict[str, dict[int, float]]) -> dict[str, Difference]:
    """The verdict on each arm, from the final losses of the reference and of the arms by seed.

    An infinite loss, or no loss at all, means that the arm or the reference diverged."""
    differences = {
        arm: [losses[seed] - reference[seed] for seed in losses] for arm, losses in arms.items()
    }
    finite = {arm: d for arm, d in differences.items() if d and np.isfinite(d).all()}
    adjusted = holm({arm: paired_t_test(d) for arm, d in finite.items() if len(d) > 1})
    verdicts = {}
    for arm in arms:
        if arm not in finite:
            verdicts[arm] = Difference("diverged")
        elif arm not in adjusted:
            verdicts[arm] = Difference("one seed", finite[arm][0])
        else:
            verdicts[arm] = tested(finite[arm], adjusted[arm])
    return verdicts


def tested(differences: list[float], p: float) -> Difference:
    """The verdict on two or more finite differences whose adjusted p is `p`."""
    mean = float(np.mean(differences))
    verdict = "no difference detected"
    if p < SIGNIFICANCE:
        verdict = "better" if mean < 0 else "worse"
    low, high = interval(differences)
    return Difference(verdict, mean, low, high, p, detectable(differences))
