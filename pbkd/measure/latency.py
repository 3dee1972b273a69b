"""How long a forward pass takes: one model, or several in one run, so that they compare.

A model is a module of PyTorch, or any function of a batch, such as a session of another runtime.

Shape legend: n = images, c = channels, h, w = height and width in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbkd.measure.eval_mode import eval_mode

# A turn is long enough for the first call to refill the caches, and short enough for all models
# to meet the same load of the machine.
_TURN_S = 0.02
_WARM_UP_CALLS = 3
_WARM_UP_S = 0.1


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass over one batch.

    Attributes:
        median_ms, p25_ms, p75_ms: quartiles of the timed calls, milliseconds per batch.
        repeats: number of timed calls; fewer than asked for where the model is slow.
        batch_size: images per batch.
        threads: CPU threads within an operation.
        device: as torch names it, like ``cpu`` or ``cuda:0``.
        dtype: of the input, like ``float32``.
    """

    median_ms: float
    p25_ms: float
    p75_ms: float
    repeats: int
    batch_size: int
    threads: int
    device: str
    dtype: str


def measure_latency(
    model: nn.Module,
    example_nchw: Tensor,
    *,
    batch_size: int,
    threads: int,
    min_duration_s: float = 1.0,
    repeats: int = 20,
    max_duration_s: float = 60.0,
) -> Latency:
    """Measure one model: ``measure_interleaved`` with a single entry.

    Two results of this function do not compare on a shared machine.
    """
    return measure_interleaved(
        {"model": model},
        example_nchw,
        batch_size=batch_size,
        threads=threads,
        min_duration_s=min_duration_s,
        repeats=repeats,
        max_duration_s=max_duration_s,
    )["model"]


def measure_interleaved(
    models: Mapping[str, Callable[[Tensor], object]],
    example_nchw: Tensor,
    *,
    batch_size: int,
    threads: int,
    min_duration_s: float = 1.0,
    repeats: int = 20,
    max_duration_s: float = 60.0,
) -> dict[str, Latency]:
    """Measure models in turns, so that all of them meet the same load, heat and clock.

    Eval mode, inference mode, after a warm-up; on CUDA each call ends with a synchronisation. The
    number of threads is set for the process meanwhile; it and the models' modes are then restored.

    Args:
        models: modules on the device of ``example_nchw``; or functions of a batch on that device,
            which return when they are done and keep to ``threads`` by themselves.
        example_nchw: at least one image; repeated or cut to ``batch_size``. Device, dtype and
            memory format of the measurement are its own.
        batch_size: images per call, at least 1.
        threads: CPU threads within an operation, at least 1.
        min_duration_s: least time of measuring after the warm-up, all models together, seconds.
        repeats: least number of timed calls per model.
        max_duration_s: no new round of turns begins after this time, all models and the warm-up
            together, seconds. It goes before the two above, but every model has one timed call.
    """
    assert batch_size >= 1
    assert threads >= 1
    assert repeats >= 1
    x_nchw = example_nchw[torch.arange(batch_size, device=example_nchw.device) % len(example_nchw)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_threads(threads))
        for model in models.values():
            if isinstance(model, nn.Module):
                stack.enter_context(eval_mode(model))
        calls = {name: _timed_call(model, x_nchw) for name, model in models.items()}
        durations_s = _in_turns(calls, min_duration_s, repeats, max_duration_s)
    return {name: _summary(durations_s[name], x_nchw, threads) for name in models}


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed_call(model: Callable[[Tensor], object], x_nchw: Tensor) -> Callable[[], float]:
    """A function that runs the model once and returns the seconds it took."""

    def call() -> float:
        start_s = time.perf_counter()
        model(x_nchw)
        if x_nchw.is_cuda:
            torch.cuda.synchronize(x_nchw.device)
        return time.perf_counter() - start_s

    return call


def _in_turns(
    calls: Mapping[str, Callable[[], float]],
    min_duration_s: float,
    repeats: int,
    max_duration_s: float,
) -> dict[str, list[float]]:
    """Seconds of each model's timed calls; at least one each."""
    begin_s = time.perf_counter()
    warm_up_limit_s = max_duration_s / (4 * max(1, len(calls)))
    calls_per_turn = {
        name: max(1, int(_TURN_S / _warm_up(call, warm_up_limit_s))) for name, call in calls.items()
    }
    durations_s: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    measuring_s = time.perf_counter()
    while order:
        for name in order:
            durations_s[name] += _turn(calls[name], calls_per_turn[name])
        order.reverse()  # so that no model always follows the same one
        now_s = time.perf_counter()
        enough = now_s - measuring_s >= min_duration_s and all(
            len(values) >= repeats for values in durations_s.values()
        )
        if enough or now_s - begin_s >= max_duration_s:
            break
    return durations_s


def _warm_up(call: Callable[[], float], limit_s: float) -> float:
    """Call until warm, or until the limit; returns the seconds of the fastest call."""
    durations_s = [call()]
    while sum(durations_s) < limit_s and (
        len(durations_s) < _WARM_UP_CALLS or sum(durations_s) < _WARM_UP_S
    ):
        durations_s.append(call())
    return min(durations_s)


def _turn(call: Callable[[], float], num_calls: int) -> list[float]:
    if num_calls > 1:
        call()  # finds the caches as the model before left them
    return [call() for _ in range(num_calls)]


def _summary(durations_s: list[float], x_nchw: Tensor, threads: int) -> Latency:
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    p25_s, median_s, p75_s = torch.tensor(durations_s, dtype=torch.float64).quantile(quartiles)
    return Latency(
        median_ms=1e3 * median_s.item(),
        p25_ms=1e3 * p25_s.item(),
        p75_ms=1e3 * p75_s.item(),
        repeats=len(durations_s),
        batch_size=len(x_nchw),
        threads=threads,
        device=str(x_nchw.device),
        dtype=str(x_nchw.dtype).removeprefix("torch."),
    )
