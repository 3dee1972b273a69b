"""CPU packages from a powercap tree made by hand."""

from pathlib import Path

import pytest

from pbkd.measure import CounterError, EnergyMeter, rapl_counters


def make_domain(root: Path, folder: str, name: str, energy_uj: str = "0") -> Path:
    domain = root / folder
    domain.mkdir(parents=True)
    (domain / "name").write_text(name + "\n")
    (domain / "max_energy_range_uj").write_text("100000000\n")
    (domain / "energy_uj").write_text(energy_uj + "\n")
    return domain


def test_packages_alone_are_counted(tmp_path: Path) -> None:
    make_domain(tmp_path, "intel-rapl:0", "package-0")
    make_domain(tmp_path, "intel-rapl:1", "package-1")
    make_domain(tmp_path, "intel-rapl:0:0", "core")
    make_domain(tmp_path, "intel-rapl:2", "psys")
    make_domain(tmp_path, "intel-rapl-mmio:0", "package-0")
    names = [counter.name for counter in rapl_counters(tmp_path)]
    assert names == ["cpu-package-0", "cpu-package-1"]


def test_microjoules_become_joules_through_wraps(tmp_path: Path) -> None:
    domain = make_domain(tmp_path, "intel-rapl:0", "package-0", "90000000")
    (counter,) = rapl_counters(tmp_path)
    for energy_uj, energy_j in (("95000000", 5), ("10000000", 20), ("90000000", 100), ("0", 110)):
        (domain / "energy_uj").write_text(energy_uj)
        assert counter.read_j() == pytest.approx(energy_j)


def test_what_cannot_be_read_is_absent(tmp_path: Path) -> None:
    make_domain(tmp_path, "intel-rapl:0", "package-0")
    no_range = make_domain(tmp_path, "intel-rapl:1", "package-1")
    (no_range / "max_energy_range_uj").unlink()
    # A folder stands for a file that must not be read: root may read any file.
    unreadable = make_domain(tmp_path, "intel-rapl:2", "package-2")
    (unreadable / "energy_uj").unlink()
    (unreadable / "energy_uj").mkdir()
    make_domain(tmp_path, "intel-rapl:3", "package-3", "no number")
    assert [counter.name for counter in rapl_counters(tmp_path)] == ["cpu-package-0"]
    assert rapl_counters(tmp_path / "nowhere") == []


def test_a_counter_that_vanishes_gives_none(tmp_path: Path) -> None:
    domain = make_domain(tmp_path, "intel-rapl:0", "package-0")
    meter = EnergyMeter(rapl_counters(tmp_path))
    with meter.window("w") as window:
        (domain / "energy_uj").unlink()
    assert window.result.energy_j == {"cpu-package-0": None}


def test_nonsense_is_an_error_of_the_counter(tmp_path: Path) -> None:
    domain = make_domain(tmp_path, "intel-rapl:0", "package-0")
    (counter,) = rapl_counters(tmp_path)
    (domain / "energy_uj").write_text("")
    with pytest.raises(CounterError, match="microjoules"):
        counter.read_j()
