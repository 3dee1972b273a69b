"""Windows of a meter over replayed counters."""

import contextlib
import threading
import time

import pytest

from pbkd.measure import EnergyMeter, EnergyReading, job_energy_j
from pbkd.testing import ReplayedCounter


def reading(energy_j: dict[str, float | None]) -> EnergyReading:
    return EnergyReading("w", 1.0, energy_j, dict.fromkeys(energy_j, "replayed"))


def test_a_window_is_the_difference_of_two_readings() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [100, 130]), ReplayedCounter("gpu-1", [5, 6])])
    with meter.window("distill") as window:
        time.sleep(0.02)
    result = window.result
    assert result.name == "distill"
    assert result.energy_j == {"gpu-0": 30, "gpu-1": 1}
    assert result.total_j == 31
    assert result.counted == ("gpu-0", "gpu-1")
    assert result.source == {"gpu-0": "replayed", "gpu-1": "replayed"}
    assert 0.02 <= result.duration_s < 1


def test_a_wrapping_counter_goes_on() -> None:
    meter = EnergyMeter([ReplayedCounter("cpu-package-0", [90, 10], range_j=100)])
    with meter.window("w") as window:
        pass
    assert window.result.energy_j == {"cpu-package-0": 20}


@pytest.mark.parametrize("readings", [[OSError("gone"), 9], [1, OSError("gone")], [80, 3]])
def test_a_failed_or_reset_counter_is_absent(readings: list[float | Exception]) -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", readings), ReplayedCounter("gpu-1", [0, 7])])
    with meter.window("w") as window:
        pass
    assert window.result.energy_j == {"gpu-0": None, "gpu-1": 7}
    assert window.result.total_j == 7
    assert window.result.counted == ("gpu-1",)


def test_a_failure_within_a_window_spoils_it_but_not_the_next_one() -> None:
    counter = ReplayedCounter("gpu-0", [0, OSError("once"), 20, 30, 40, 50])
    meter = EnergyMeter([counter])
    with meter.window("outer") as outer, meter.window("inner") as inner:
        pass
    with meter.window("next") as following:
        pass
    assert inner.result.energy_j == {"gpu-0": None}
    assert outer.result.energy_j == {"gpu-0": None}
    assert following.result.energy_j == {"gpu-0": 10}


def test_a_reset_seen_by_another_window_spoils_both() -> None:
    # The outer window's own edges, 10 and 60 J, would give a plausible, wrong 50 J.
    meter = EnergyMeter([ReplayedCounter("gpu-0", [10, 20, 3, 60])])
    with meter.window("outer") as outer, meter.window("inner") as inner:
        pass
    assert inner.result.energy_j == {"gpu-0": None}
    assert outer.result.energy_j == {"gpu-0": None}


def test_windows_nest() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [0, 10, 30, 100])])
    with meter.window("outer") as outer, meter.window("inner") as inner:
        pass
    assert (inner.result.total_j, outer.result.total_j) == (20, 100)


def test_windows_overlap_between_threads() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [0, 10, 30, 100])])
    opened, closed = threading.Event(), threading.Event()
    totals: list[float | None] = []

    def second() -> None:
        with meter.window("second") as window:
            opened.set()
            assert closed.wait(5)
        totals.append(window.result.total_j)

    thread = threading.Thread(target=second)
    with meter.window("first") as window:
        thread.start()
        assert opened.wait(5)
    closed.set()
    thread.join(5)
    assert window.result.total_j == 30
    assert totals == [90]


def test_a_count_that_did_not_move_is_not_zero() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [50, 50])])
    with meter.window("w") as window:
        pass
    assert window.result.energy_j == {"gpu-0": None}
    assert window.result.total_j is None


def test_without_devices_there_is_a_duration_and_no_energy() -> None:
    with EnergyMeter([]).window("w") as window:
        pass
    assert window.result.duration_s >= 0
    assert window.result.total_j is None
    assert window.result.counted == ()


def test_the_result_is_there_after_an_error_and_not_before() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [0, 10])])
    with contextlib.suppress(KeyError), meter.window("w") as window:
        with pytest.raises(AssertionError, match="still open"):
            _ = window.result
        raise KeyError
    assert window.result.total_j == 10


def test_a_polled_counter_is_read_while_windows_are_open() -> None:
    # It wraps between the edges again and again: without the polls 70 J would come out.
    polls = [0, 0, 70, 40, 10, 80, 50, 20, 90, 60, 30] + [10] * 1000
    counter = ReplayedCounter("cpu-package-0", polls, range_j=100, poll_interval_s=0.01)
    meter = EnergyMeter([counter])
    num_threads = threading.active_count()
    with meter.window("w") as window:
        time.sleep(0.4)
        assert threading.active_count() == num_threads + 1
    assert window.result.energy_j["cpu-package-0"] == 9 * 70 + 80
    time.sleep(0.1)
    assert threading.active_count() == num_threads


def test_a_poll_that_fails_spoils_the_window() -> None:
    readings: list[float | Exception] = [0, 0, OSError("lost sample"), *range(10, 2000)]
    meter = EnergyMeter([ReplayedCounter("gpu-0", readings, poll_interval_s=0.01)])
    with meter.window("w") as window:
        time.sleep(0.1)
    assert window.result.energy_j == {"gpu-0": None}


def test_what_was_lost_before_the_window_does_not_count() -> None:
    meter = EnergyMeter(
        [ReplayedCounter("gpu-0", [OSError("not polled for long"), 5, 9], poll_interval_s=60)]
    )
    with meter.window("w") as window:
        pass
    assert window.result.energy_j == {"gpu-0": 4}


def test_a_fault_of_the_program_is_not_swallowed() -> None:
    meter = EnergyMeter([ReplayedCounter("gpu-0", [])])
    with pytest.raises(AssertionError, match="no reading"), meter.window("w"):
        pass


def test_a_job_has_energy_only_on_a_device_of_its_own() -> None:
    result = reading({"gpu-0": 12.0, "gpu-1": None})
    assert job_energy_j(result, "gpu-0", exclusive=True) == 12
    assert job_energy_j(result, "gpu-0", exclusive=False) is None
    assert job_energy_j(result, "gpu-1", exclusive=True) is None
    assert job_energy_j(result, "gpu-2", exclusive=True) is None


def test_this_machine_has_unique_devices_or_none() -> None:
    meter = EnergyMeter.of_this_machine()
    with meter.window("w") as window:
        pass
    assert tuple(window.result.energy_j) == meter.devices
