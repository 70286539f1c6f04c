"""Statistics of the report: over the trials of a pair of networks, and over pairs."""

import itertools

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of all tests; intervals cover 1 - LEVEL
EXACT = 16  # the signed-rank test is exact for up to this many pairs


def mean_sd(values: list[float]) -> list[float | None]:
    """Mean, and standard deviation with ddof 1; none of a single value."""
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]


def paired(differences: list[float]) -> list[float | None]:
    """Mean difference and half the width of its t interval; none for a single trial."""
    mean, sd = mean_sd(differences)
    return [mean, None if sd is None else interval(sd / len(differences) ** 0.5, len(differences) - 1)]


def welch(a: tuple[float, float, int], b: tuple[float, float, int]) -> list[float]:
    """Difference of two means and half the width of its interval, from their (mean, sd, n); variances may differ."""
    va, vb = a[1] ** 2 / a[2], b[1] ** 2 / b[2]
    if va + vb == 0:
        return [a[0] - b[0], 0.0]
    df = (va + vb) ** 2 / (va**2 / (a[2] - 1) + vb**2 / (b[2] - 1))  # Welch-Satterthwaite
    return [a[0] - b[0], interval((va + vb) ** 0.5, df)]


def interval(error: float, df: float) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, df) * error)


def signed_rank(differences: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are dropped.

    Exact for few pairs, ties included: scipy takes a normal approximation there, whose p can be below the smallest
    possible.
    """
    d = np.round(differences, 9)  # accuracies are multiples of 0.01, up to the error of their difference
    d = d[d != 0]
    if len(d) > EXACT:
        return float(stats.wilcoxon(d, method="approx").pvalue)
    ranks = stats.rankdata(np.abs(d))
    signs = np.array(list(itertools.product((0, 1), repeat=len(d))))  # (2^n, n)
    sums, centre = signs @ ranks, ranks.sum() / 2
    return float(np.mean(np.abs(sums - centre) >= abs(ranks[d > 0].sum() - centre) - 1e-9))


def holm(ps: list[float]) -> list[float]:
    """p values adjusted for as many comparisons, in the same order."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(np.sort(ps) * np.arange(len(ps), 0, -1)).clip(max=1)
    return adjusted.tolist()


def mean_ranks(table: np.ndarray) -> np.ndarray:
    """Mean rank of each column (a method) over the rows (pairs); 1 is the highest value."""
    return stats.rankdata(-np.round(table, 9), axis=1).mean(0)


def critical_difference(n_methods: int, n_pairs: int) -> float:
    """Nemenyi's: mean ranks that differ by less are not distinguished."""
    q = stats.studentized_range.ppf(1 - LEVEL, n_methods, np.inf) / 2**0.5
    return float(q * (n_methods * (n_methods + 1) / (6 * n_pairs)) ** 0.5)


def beats(pairs: list[list[float]], n: int = 2000, seed: int = 0) -> list[float]:
    """P(A > B) of a trial, with a bootstrap interval over pairs and over the trials within them.

    pairs: for each pair of networks, A minus B of every trial that both have (same seed). Ties count half.
    """
    rng = np.random.default_rng(seed)
    wins = [(np.sign(np.round(d, 9)) + 1) / 2 for d in pairs]
    # resampled means of each pair, one for every time that it may be drawn
    means = np.stack([rng.choice(w, (n, len(wins), len(w))).mean(-1) for w in wins], -1)  # (n, draw, pair)
    drawn = rng.integers(len(wins), size=(n, len(wins), 1))
    p = np.take_along_axis(means, drawn, -1).mean((1, 2))
    return [float(np.mean([w.mean() for w in wins])), *np.quantile(p, [LEVEL / 2, 1 - LEVEL / 2]).tolist()]


def detectable(n: int, power: float = 0.8) -> float:
    """Difference, in standard deviations, that a t test of two groups of n trials finds with this probability."""
    df = 2 * n - 2
    t = stats.t.ppf(1 - LEVEL / 2, df)
    # the chance of finding it with the wrong sign is negligible
    return float(optimize.brentq(lambda d: 1 - stats.nct.cdf(t, df, d * (n / 2) ** 0.5) - power, 0.1, 10))
