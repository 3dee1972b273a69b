"""Latency by runtime: all forms of all models, in turns, under one setting each."""

from __future__ import annotations

import pytest
import torch

from pbkd.errors import ArtifactError
from pbkd.export import OnnxModel, runtime_latencies
from pbkd.export.latencies import TimedModel
from tests.export.networks import images_of


def test_every_model_is_measured_in_every_runtime_and_setting(vgg):
    files = {"onnxruntime": vgg.onnx, "onnxruntime-int8": vgg.int8}
    models = {"both": TimedModel(vgg.model, files), "plain": TimedModel(vgg.model, {})}
    found = runtime_latencies(
        models,
        images_of(vgg.card, 1),
        batch_sizes=(1, 4),
        threads=(1, 2),
        seconds=0.02,
        max_seconds=240.0,
    )
    runtimes = ("pytorch", "onnxruntime", "onnxruntime-int8")
    keys = {
        name: [(e.latency.batch_size, e.latency.threads, e.runtime) for e in entries]
        for name, entries in found.items()
    }
    settings = [(size, threads) for size in (1, 4) for threads in (1, 2)]
    assert keys["both"] == [(*setting, runtime) for setting in settings for runtime in runtimes]
    assert keys["plain"] == [(*setting, "pytorch") for setting in settings]
    for entries in found.values():
        for entry in entries:
            assert entry.latency.repeats >= 20
            assert 0 < entry.latency.p25_ms <= entry.latency.median_ms <= entry.latency.p75_ms


def test_a_session_has_the_threads_of_the_setting(vgg, monkeypatch):
    import onnxruntime

    made = []
    whole = onnxruntime.InferenceSession

    def session(path, options, **others):
        made.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return whole(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    runtime_latencies(
        {"model": TimedModel(vgg.model, {"onnxruntime": vgg.onnx})},
        images_of(vgg.card, 1),
        batch_sizes=(1,),
        threads=(2, 1),
        seconds=0.01,
        max_seconds=5.0,
    )
    assert made == [(2, 1), (1, 1)]


def test_a_session_takes_any_layout_and_is_no_part_of_a_graph(vgg):
    images = images_of(vgg.card, 3)
    model = OnnxModel(vgg.onnx, threads=1)
    last = model(images.to(memory_format=torch.channels_last).requires_grad_())
    assert torch.equal(model(images), last)
    assert not last.requires_grad


def test_a_missing_file_is_an_error(vgg, tmp_path):
    models = {"model": TimedModel(vgg.model, {"onnxruntime": tmp_path / "absent.onnx"})}
    with pytest.raises(ArtifactError, match="is missing"):
        runtime_latencies(
            models,
            images_of(vgg.card, 1),
            batch_sizes=(1,),
            threads=(1,),
            seconds=0.01,
            max_seconds=1.0,
        )
