"""Tests, intervals and power of verdicts against statsmodels, scipy and simulation."""

from __future__ import annotations

import subprocess
import sys

import anova
import numpy as np
import pytest
from scipy import optimize, stats

from lorabench.compare import power, statistics
from lorabench.compare.power import Design
from lorabench.compare.statistics import Components, components, decide, holm

# Standard deviations of a difference over seeds, over examples and of the rest.
GRID = [(0, 0.3, 0.3), (0.02, 0.3, 0.3), (0.05, 0.1, 0.3), (0.1, 0.1, 0.1), (0.1, 0, 0.1)]


def drawn(rng: np.random.Generator, spreads: tuple[float, float, float], *shape: int) -> np.ndarray:
    """Differences of tables, (..., S, N)."""
    *before, seeds, examples = shape
    parts = ((*before, seeds, 1), (*before, 1, examples), shape)
    return sum(sd * rng.standard_normal(part) for sd, part in zip(spreads, parts, strict=True))


@pytest.mark.parametrize("shape", [(2, 5), (3, 40), (8, 11)])
def test_mean_squares_are_statsmodels_of_a_crossed_table(shape: tuple[int, int]) -> None:
    table = drawn(np.random.default_rng(0), (0.1, 0.2, 0.3), *shape) + 0.7
    found = components(table)
    squares, _ = anova.mean_squares(table)
    assert [float(found.seeds), float(found.examples), float(found.rest)] == pytest.approx(
        squares, rel=1e-9
    )
    assert float(found.mean) == pytest.approx(table.mean(), rel=1e-12)


def test_where_only_seeds_vary_the_p_value_is_that_of_the_paired_t_test() -> None:
    """Every example of a seed has the same difference: scipy's t over seeds says it all."""
    rng = np.random.default_rng(1)
    for seeds in (3, 5, 8):
        by_seed = 0.3 + rng.standard_normal(seeds)
        found = decide(Components.stacked([components(np.repeat(by_seed[:, None], 20, 1))]))
        expected = stats.ttest_1samp(by_seed, 0)
        assert found.p[0] == pytest.approx(expected.pvalue, rel=1e-6)
        interval = expected.confidence_interval(0.95)
        ends = [found.low[0], found.high[0]]
        assert ends == pytest.approx([interval.low, interval.high], rel=1e-6)


@pytest.mark.slow
def test_holm_is_statsmodels_and_the_interval_says_what_the_outcome_says() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 2, 13):
        for _ in range(15):
            tables = drawn(rng, (0.05, 0.1, 0.3), count, 5, 30)
            tables = tables + rng.choice([0, 0, 0.2, 0.5], count)[:, None, None]
            found = decide(components(tables))
            rejected, adjusted = anova.holm(found.p)
            assert (found.found == rejected).all()
            assert found.adjusted == pytest.approx(adjusted, rel=1e-12)
            without_zero = (found.low > 0) | (found.high < 0)
            assert (found.found == without_zero).all()
            assert (found.low <= found.alone[0] + 1e-12).all()


def test_holm_of_equal_and_of_certain_p_values() -> None:
    levels, adjusted, found = holm(np.array([0.0, 0.02, 0.02, 1.0]))
    assert found.tolist() == [True, False, False, False]
    assert levels == pytest.approx([0.05 / 4, 0.05 / 3, 0.05 / 3, 0.05 / 3])
    assert adjusted == pytest.approx([0, 0.06, 0.06, 1])


@pytest.mark.parametrize("spreads", GRID)
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_power_is_what_simulation_gives(spreads: tuple, seeds: int) -> None:
    examples, commands = 50, 1500
    named = dict(zip(("seeds", "examples", "rest"), map(float, spreads), strict=True))
    design = Design(named, seeds, examples, 0.05)
    difference = design.smallest()
    assert design.power(difference) == pytest.approx(0.8, abs=1e-3)
    for size in (difference, difference / 2):
        tables = drawn(np.random.default_rng(3), spreads, commands, seeds, examples) + size
        share = float((statistics.test_of(components(tables)).p <= 0.05).mean())
        # Five points are promised; the simulation errs by 1.3 (one standard error).
        assert share == pytest.approx(design.power(size), abs=0.05)


@pytest.mark.parametrize(("seeds", "factor"), [(3, 2.1), (5, 1.6), (8, 1.35)])
def test_the_upper_limit_of_the_spread_over_seeds_holds_in_80_percent(
    seeds: int, factor: float
) -> None:
    tables = drawn(np.random.default_rng(4), (0.1, 0.1, 0.1), 2000, seeds, 200)
    found = components(tables)
    upper = power.upper_spreads(found)["seeds"]
    assert float((upper >= 0.1).mean()) == pytest.approx(0.8, abs=0.03)
    ratio = upper / np.maximum(found.spreads["seeds"], 1e-9)
    assert float(np.median(ratio)) == pytest.approx(factor, rel=0.05)


def test_tables_without_any_spread() -> None:
    nothing = decide(components(np.zeros((1, 3, 10))))
    assert nothing.p[0] == 1 and not nothing.found[0] and nothing.low[0] == nothing.high[0] == 0
    same = decide(components(np.ones((1, 3, 10))))
    assert same.p[0] == 0 and same.found[0] and same.low[0] == same.high[0] == 1
    with pytest.raises(ValueError, match="at least 2 examples"):
        components(np.zeros((3, 1)))


def share_found(tables: np.ndarray) -> float:
    return float((statistics.test_of(components(tables)).p <= 0.05).mean())


def at_80_percent(degrees: int, error: float) -> float:
    """The difference that a t-test of this many degrees of freedom finds in 80%."""
    limit = stats.t.isf(0.025, degrees)

    def missing(size: float) -> float:
        # The other tail is below 1e-3 of it, and NaN in some versions of scipy.
        return 0.2 - stats.nct.cdf(limit, degrees, size)

    return error * optimize.brentq(missing, 1, 3 + 12 / degrees)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_where_only_seeds_vary_no_power_is_lost(seeds: int) -> None:
    size = at_80_percent(seeds - 1, 0.1 / np.sqrt(seeds))
    tables = drawn(np.random.default_rng(5), (0.1, 0, 1e-9), 2000, seeds, 20) + size
    assert share_found(tables) >= 0.95 * 0.8 - 0.02  # the simulation errs by 0.9 points


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.65), (5, 0.9), (8, 0.95)])
def test_where_only_examples_vary_most_of_the_power_is_left(seeds: int, share: float) -> None:
    """Against a t over examples, which knows that seeds do not matter."""
    examples = 100
    error = np.sqrt((0.3**2 + 0.3**2 / seeds) / examples)
    size = at_80_percent(examples - 1, error)
    tables = drawn(np.random.default_rng(6), (0, 0.3, 0.3), 1500, seeds, examples) + size
    assert share_found(tables) >= share * 0.8 - 0.02


def test_no_command_reads_scipy_stats() -> None:
    """It takes a second to import; what is needed of it is in scipy.special."""
    code = (
        "import sys; import lorabench.compare.answers as a; "
        "sys.exit('scipy.stats' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
