"""The arithmetic of counters: wraps, resets, gaps."""

import pytest

from pbkd.measure import CounterError, PowerIntegral, Unwrapped


def test_a_known_range_counts_through_several_wraps() -> None:
    counter = Unwrapped(range_j=100.0)
    assert [counter.update(raw) for raw in (90, 10, 60, 5, 5)] == [0, 20, 70, 115, 115]


def test_a_fall_without_a_range_is_a_reset_and_never_negative() -> None:
    counter = Unwrapped(range_j=None)
    assert [counter.update(raw) for raw in (50, 80)] == [0, 30]
    with pytest.raises(CounterError, match="reset"):
        counter.update(3)
    assert counter.update(13) == 40


def test_a_value_above_the_range_is_refused() -> None:
    counter = Unwrapped(range_j=10.0)
    counter.update(90)
    with pytest.raises(CounterError, match="range"):
        counter.update(1)


def test_power_is_integrated_by_trapezoids() -> None:
    integral = PowerIntegral(max_gap_s=10)
    samples = [(5.0, 100.0), (6.0, 200.0), (8.0, 200.0), (8.5, 0.0)]
    assert [integral.update(*sample) for sample in samples] == [0, 150, 550, 600]


def test_a_gap_between_samples_is_not_estimated() -> None:
    integral = PowerIntegral(max_gap_s=1)
    integral.update(0.0, 100.0)
    with pytest.raises(CounterError, match="no power sample"):
        integral.update(2.0, 100.0)
    assert integral.update(3.0, 100.0) == 100
