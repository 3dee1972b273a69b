"""Latency by models that know what they are asked."""

import time

import pytest
import torch
from torch import Tensor, nn

from pbkd.measure import Latency, measure_interleaved, measure_latency

IMAGES_NCHW = torch.rand(2, 3, 4, 4)


class Sleeper(nn.Module):
    """Takes a known time, and writes down its calls."""

    def __init__(self, name: str, duration_s: float, log: list[str]) -> None:
        super().__init__()
        self.part = nn.BatchNorm2d(3).eval()
        self.name, self.duration_s, self.log = name, duration_s, log
        self.threads: set[int] = set()
        self.batches: list[Tensor] = []

    def forward(self, x_nchw: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.log.append(self.name)
        self.threads.add(torch.get_num_threads())
        self.batches.append(x_nchw)
        time.sleep(self.duration_s)
        return x_nchw


def test_the_median_is_the_time_of_a_call() -> None:
    model = Sleeper("a", 0.01, [])
    latency = measure_latency(
        model, IMAGES_NCHW, batch_size=5, threads=1, min_duration_s=0.1, repeats=4
    )
    assert 10 <= latency.p25_ms <= latency.median_ms <= latency.p75_ms < 100
    assert (latency.batch_size, latency.threads) == (5, 1)
    assert (latency.device, latency.dtype) == ("cpu", "float32")
    assert latency.repeats >= 4


def test_the_batch_repeats_the_images_and_keeps_their_format() -> None:
    model = Sleeper("a", 0.0, [])
    images_nchw = IMAGES_NCHW.to(memory_format=torch.channels_last)
    measure_latency(model, images_nchw, batch_size=5, threads=1, min_duration_s=0.01, repeats=1)
    batch_nchw = model.batches[0]
    assert torch.equal(batch_nchw, images_nchw[[0, 1, 0, 1, 0]])
    assert batch_nchw.is_contiguous(memory_format=torch.channels_last)


def test_threads_and_modes_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    model = Sleeper("a", 0.0, [])
    measure_latency(
        model, IMAGES_NCHW, batch_size=1, threads=before + 1, min_duration_s=0.01, repeats=1
    )
    assert model.threads == {before + 1}
    assert torch.get_num_threads() == before
    assert model.training
    assert not model.part.training


def test_threads_and_modes_are_restored_where_the_model_fails() -> None:
    before = torch.get_num_threads()
    model = nn.Linear(99, 1)
    with pytest.raises(RuntimeError):
        measure_latency(model, IMAGES_NCHW, batch_size=1, threads=before + 1)
    assert torch.get_num_threads() == before
    assert model.training


def test_models_take_turns_in_changing_order() -> None:
    log: list[str] = []
    models = {name: Sleeper(name, 0.03, log) for name in ("a", "b")}
    measure_interleaved(
        models, IMAGES_NCHW, batch_size=1, threads=1, min_duration_s=0.01, repeats=4
    )
    assert log[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_interleaved_times_have_the_right_ratio() -> None:
    models = {"fast": Sleeper("fast", 0.004, []), "slow": Sleeper("slow", 0.02, [])}
    latencies = measure_interleaved(
        models, IMAGES_NCHW, batch_size=1, threads=1, min_duration_s=0.2, repeats=5
    )
    assert list(latencies) == ["fast", "slow"]
    assert 2 < latencies["slow"].median_ms / latencies["fast"].median_ms < 6


def test_a_slow_model_is_called_a_bounded_number_of_times() -> None:
    model = Sleeper("a", 0.1, [])
    latency = measure_latency(
        model, IMAGES_NCHW, batch_size=1, threads=1, repeats=1000, max_duration_s=0.3
    )
    assert 1 <= latency.repeats <= 3
    assert len(model.log) <= 4


def test_a_model_slower_than_the_limit_is_still_timed_once() -> None:
    model = Sleeper("a", 0.05, [])
    latency = measure_latency(
        model, IMAGES_NCHW, batch_size=1, threads=1, repeats=9, max_duration_s=0.001
    )
    assert latency.repeats == 1
    assert latency.p25_ms == latency.median_ms == latency.p75_ms


def test_the_warm_up_is_left_out() -> None:
    model = SlowStart()
    latency = measure_latency(
        model, IMAGES_NCHW, batch_size=1, threads=1, min_duration_s=0.01, repeats=3
    )
    assert isinstance(latency, Latency)
    assert latency.p75_ms < 100


class SlowStart(nn.Module):
    """Its first two calls take long, as those of a compiled model do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, x_nchw: Tensor) -> Tensor:
        self.num_calls += 1
        time.sleep(0.2 if self.num_calls <= 2 else 0.02)
        return x_nchw


def test_a_function_is_measured_beside_a_module() -> None:
    module = Sleeper("module", 0.001, [])
    calls: list[int] = []

    def function(x_nchw: Tensor) -> None:
        calls.append(len(x_nchw))
        time.sleep(0.003)

    found = measure_interleaved(
        {"module": module, "function": function},
        IMAGES_NCHW,
        batch_size=5,
        threads=1,
        min_duration_s=0.02,
        repeats=3,
    )
    assert set(calls) == {5}
    assert found["module"].median_ms < found["function"].median_ms
    assert found["function"].repeats >= 3
