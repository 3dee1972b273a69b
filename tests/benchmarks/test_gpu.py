"""benchmarks/gpu.py runs as a whole at toy size on the CPU, without the pipeline's packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PIPELINE = ("prefect", "dvc", "mlflow", "rich", "typer", "fastapi", "matplotlib", "jinja2")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import harness

    monkeypatch.setattr(harness, "_RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "_PARTIAL", tmp_path / "gpu.partial.json")
    return gpu


def run(gpu, monkeypatch, tmp_path, *options):
    arguments = ["--device", "cpu", "--quick", "--images", "64", "--width", "0.0625", *options]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    return json.loads((tmp_path / "gpu.json").read_text())


def test_all_variants_are_measured_and_train_to_the_same_losses(gpu, monkeypatch, tmp_path, capsys):
    result = run(gpu, monkeypatch, tmp_path)
    samples, targets = result["samples"], result["targets"]
    assert list(samples) == ["before", "published", "relay", "cache"]
    assert [len(samples[name]["epochs"]) for name in list(samples)[1:]] == [1, 2, 2]
    assert len(samples["before"]) == 13
    assert samples["relay"]["losses"] != pytest.approx(samples["before"], rel=1e-4)
    assert samples["cache"]["fill"]["duration_s"] > 0
    assert samples["cache"]["scale"] == 1
    assert [target["value"] for target in targets[:3]] == [None, None, None]  # no GPU
    assert targets[3]["value"] < 2
    printed = capsys.readouterr().out
    assert "a check of this script alone" in printed
    assert "3,920 s on one RTX 2080 Ti" in printed
    assert not (tmp_path / "gpu.partial.json").exists()


def test_a_killed_call_leaves_what_it_measured(gpu, monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu._Bench, "_cache", killed)
    with pytest.raises(KeyboardInterrupt):
        run(gpu, monkeypatch, tmp_path)
    partial = json.loads((tmp_path / "gpu.partial.json").read_text())
    assert list(partial["samples"]) == ["before", "published", "relay"]
    assert partial["settings"]["floor"]["memory_s"] > 0


def test_a_cache_that_has_no_room_holds_fewer_views_and_images(gpu, monkeypatch, tmp_path):
    class Usage:
        free = 0

    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda _: Usage)
    result = run(gpu, monkeypatch, tmp_path)
    cache = result["samples"]["cache"]
    assert cache["scale"] == 2  # a batch of 32 out of 64 images
    assert cache["note"].startswith("1 of 2 views, 32 of 64 images")
    assert cache["note"].endswith("limit: the disk")
    assert "cache" not in result["targets"][3]["name"]  # other steps, other losses


def test_a_variant_that_fails_is_left_out_with_its_reason(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu._Bench, "_cache", lambda *_: 1 / 0)
    result = run(gpu, monkeypatch, tmp_path)
    assert list(result["samples"]) == ["before", "published", "relay"]
    assert result["rows"][-1]["note"].startswith("ZeroDivisionError")


def test_projections_count_filling_and_images_left_out(gpu):
    import outcome

    epochs = [outcome.Cost(3.0, 30.0), outcome.Cost(1.0, 10.0), outcome.Cost(2.0, 20.0)]
    whole = outcome.Outcome(epochs, {}, None, outcome.Cost(5.0, 50.0), scale=2.0)
    assert whole.duration_s(16) == 2 * (5 + 16 * 2)
    assert whole.duration_s(3) == 2 * (5 + 6)  # all were run
    assert whole.energy_j(16) == 2 * (50 + 16 * 20)
    unread = outcome.Outcome([*epochs, outcome.Cost(1.0, None)], {}, None)
    assert unread.energy_j(16) is None


def test_the_floor_is_the_larger_of_traffic_and_arithmetic(gpu):
    import case
    import floor

    made = case.make_case(case.Size("vgg_small", 8, num_val=4, width=0.125, batch_size=4, epochs=1))
    path = made.paths[0]  # 3 to 4 channels, 32 x 32 pixels
    one = case.replace(made, candidates={path: made.candidates[path]})
    found = floor.floor_of(one, floor.Rates(bytes_per_s=1.0, flops_per_s=1.0))
    pixels, steps, batch = 32 * 32, 2, 4
    elements = pixels * (3 + 3 + 3 + 3 + 3 + 3 + 3 + 4)
    weights = 27 + 9 + 27 + 12
    num_bytes = 2 * (2 * (batch * elements + weights) + batch * pixels * 4)
    assert found.memory_s == steps * num_bytes
    assert found.arithmetic_s == steps * batch * pixels * weights * 2 * 3
    assert found.duration_s == max(found.memory_s, found.arithmetic_s)


def test_it_imports_nothing_of_the_pipeline():
    code = f"""
import sys
for name in {PIPELINE!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCHMARKS.parent)
