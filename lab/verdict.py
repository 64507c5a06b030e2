"""The statistics of a comparison: pure functions of losses and step times.

Order: what an estimate and a verdict are; Student's t and what is computed with it; Holm's
correction for several tests; the ratio of two step times; and last `judge`, which makes verdicts of
them. Losses are in nats per token, and a lower one is better.
"""

import math
from dataclasses import dataclass

import numpy as np

SIGNIFICANCE, POWER = 0.05, 0.8
FEWEST_SEEDS = 4  # with fewer, Student's interval is more than twice as wide as a normal one


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom that this error has."""

    mean: float
    error: float
    df: int


@dataclass(frozen=True)
class Difference:
    """The losses of an arm less those of the reference, paired by seed: below 0 the arm is better.

    The verdict is 'better', 'worse' or 'no difference detected', or 'not after correction' if only
    a test of this arm alone would find a difference. Where nothing can be tested it is 'diverged'
    or 'one seed', and the numbers that do not exist are NaN."""

    verdict: str
    mean: float = math.nan
    low: float = math.nan  # 95% interval of the mean over seeds
    high: float = math.nan
    p: float = math.nan  # of the two-sided paired t-test, Holm-adjusted over the arms
    detectable: float = math.nan  # smallest true difference that such a test usually finds
    comparisons: int = 1  # tests for which p is adjusted
    p_equal: float = math.nan  # of the test for equality within the margin, if there is a margin


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


def estimate(values: list[float]) -> Estimate:
    """The mean of two or more independent values, and how far it can be trusted."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(float(np.mean(values)), error, len(values) - 1)


def sum_of(a: Estimate, b: Estimate) -> Estimate:
    """The sum of two independent estimates. Its degrees of freedom are those of Satterthwaite 1946
    and Welch 1947, rounded down."""
    variances = (a.error**2, b.error**2)
    total = sum(variances)
    mean, df = a.mean + b.mean, a.df + b.df
    if total > 0:
        df = int(total**2 / (variances[0] ** 2 / a.df + variances[1] ** 2 / b.df) + 1e-9)
    return Estimate(mean, math.sqrt(total), df)


def p_above(e: Estimate, bound: float) -> float:
    """One-sided p of the hypothesis that the true mean is `bound` or less."""
    if e.error == 0:
        return 0.0 if e.mean > bound else 1.0
    t = (e.mean - bound) / e.error
    tail = (1 - t_inside(abs(t), e.df)) / 2
    return tail if t > 0 else 1 - tail


def paired_t_test(e: Estimate) -> float:
    """Two-sided p of the hypothesis that the true mean, of paired differences, is 0.

    Student 1908."""
    if e.error == 0:
        return 1.0 if e.mean == 0 else 0.0
    return 1 - t_inside(abs(e.mean) / e.error, e.df)


def equivalence_test(e: Estimate, margin: float) -> float:
    """p of the hypothesis that the true mean is `margin` or more away from 0: below 5% it is shown
    to be nearer.

    It is the larger p of two one-sided tests. Schuirmann 1987."""
    mirrored = Estimate(-e.mean, e.error, e.df)
    return max(p_above(e, -margin), p_above(mirrored, -margin))


def interval(e: Estimate) -> tuple[float, float]:
    """The true means that paired_t_test does not reject at 5%.

    With few seeds the interval of a bootstrap is too narrow (docs/LOG.md), so it is not one."""
    reach = t_quantile(1 - SIGNIFICANCE / 2, e.df) * e.error
    return e.mean - reach, e.mean + reach


def detectable(e: Estimate) -> float:
    """The smallest true mean that the test at 5%, not adjusted, finds with 80% power if values
    spread as these do. Bloom 1995."""
    return (t_quantile(1 - SIGNIFICANCE / 2, e.df) + t_quantile(POWER, e.df)) * e.error


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values adjusted for there being several of them: the smallest of m times m, the next times
    m - 1, and so on, none below the one before it. Holm 1979."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = largest
    return adjusted


def log_ratio(seconds: list[list[float]], reference: list[list[float]]) -> Estimate:
    """The logarithm of how many times the reference's step time another one is, from the times of
    two or more processes, round by round.

    A process gives one value: the median over its rounds. Both times of a round are measured
    together, so drift cancels. The rounds of a process share its memory layout and its neighbours,
    so they are not independent; processes are."""
    ratios = [np.divide(*both) for both in zip(seconds, reference, strict=True)]
    return estimate([math.log(np.median(each)) for each in ratios])


def time_ratio(
    seconds: list[list[float]], reference: list[list[float]]
) -> tuple[float, float, float]:
    """(ratio, low, high): log_ratio as a ratio, with its 95% interval."""
    e = log_ratio(seconds, reference)
    low, high = interval(e)
    return math.exp(e.mean), math.exp(low), math.exp(high)


def doubt_about_time(
    ratio: Estimate, steps: tuple[int, int], losses: tuple[float, float]
) -> Estimate:
    """What the loss at equal wall-clock may be wrong by, because the time ratio is uncertain: an
    estimate whose mean is 0.

    `ratio` is a log_ratio; steps and mean losses are the arm's at equal steps and at equal
    wall-clock. If the reference makes N steps, an arm with the time ratio r makes S = N / r. So an
    error d of log r is an error of S d steps, and S d (dL / dS) nats: the standard error is S times
    the slope times that of log r. The slope is taken between the arm's two lengths of training."""
    (n, s), (at_n, at_s) = steps, losses
    slope = (at_s - at_n) / (s - n)
    return Estimate(0.0, abs(slope) * s * ratio.error, ratio.df)


def judge(
    reference: dict[int, float],
    arms: dict[str, dict[int, float]],
    margin: float = 0.0,
    doubts: dict[str, Estimate] | None = None,
) -> dict[str, Difference]:
    """The verdict on each arm, from the final losses of the reference and of the arms by seed.

    An infinite loss, or no loss at all, means that the arm or the reference diverged. `margin`, in
    nats per token, asks for a test of equality too. `doubts` are added to the differences."""
    differences = {
        arm: [losses[seed] - reference[seed] for seed in losses] for arm, losses in arms.items()
    }
    finite = {arm: d for arm, d in differences.items() if d and np.isfinite(d).all()}
    estimates = {arm: estimate(d) for arm, d in finite.items() if len(d) > 1}
    estimates |= {a: sum_of(estimates[a], doubts[a]) for a in estimates if a in (doubts or {})}
    adjusted = holm({arm: paired_t_test(e) for arm, e in estimates.items()})
    verdicts = {}
    for arm in arms:
        if arm not in finite:
            verdicts[arm] = Difference("diverged")
        elif arm not in estimates:
            verdicts[arm] = Difference("one seed", finite[arm][0])
        else:
            verdicts[arm] = tested(estimates[arm], adjusted[arm], len(estimates), margin)
    return verdicts


def tested(e: Estimate, p: float, comparisons: int, margin: float) -> Difference:
    """The verdict on a difference whose p, adjusted for so many comparisons, is `p`."""
    verdict = "no difference detected"
    if p < SIGNIFICANCE:
        verdict = "better" if e.mean < 0 else "worse"
    elif paired_t_test(e) < SIGNIFICANCE:
        verdict = "not after correction"
    p_equal = equivalence_test(e, margin) if margin else math.nan
    return Difference(verdict, e.mean, *interval(e), p, detectable(e), comparisons, p_equal)


def interaction(square: list[dict[int, float]], margin: float = 0.0) -> Difference:
    """(A less B) less (C less D), paired by seed, of the losses by seed of four arms A, B, C, D.

    That one difference is significant and another one is not does not show that they differ; this
    does. 'better' and 'worse' mean that it is below and above 0."""
    a, b, c, d = square
    if any(losses.keys() != a.keys() for losses in square):  # one that diverged has none
        return Difference("diverged")
    left, right = ({seed: x[seed] - y[seed] for seed in x} for x, y in ((a, b), (c, d)))
    return judge(right, {"left": left}, margin)["left"]
