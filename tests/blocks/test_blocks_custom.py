"""Kinds of the user's own: what they may do, and what is said where they do something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pbkd.blocks import build_candidate, find_blocks, init_candidate, settle_candidate
from pbkd.config import AugmentConfig, BlocksConfig, CustomConfig, DistillConfig
from pbkd.distill import TraineeSpec
from pbkd.errors import CandidateError, ConfigError
from pbkd.models import Classifier, ModelCard, NetworkSpec, build_classifier, save_model
from pbkd.students import load_model, stitch
from tests.blocks.library import started

OWN = "tests.blocks.own_kinds"
X_NCHW = torch.randn(2, 8, 6, 6)


def _kind(function: str, module: str = OWN, **settings: int) -> CustomConfig:
    return CustomConfig(kind=f"{module}:{function}", settings=settings)


def _conv(**settings: int) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, **settings)


def test_a_function_makes_the_module_with_its_settings() -> None:
    candidate = started(_kind("thin", width=3), _conv(), X_NCHW)
    assert candidate(X_NCHW).shape == X_NCHW.shape
    assert candidate[0].out_channels == 3  # type: ignore[index, union-attr]


def test_it_may_take_parts_of_the_block_which_stays_as_it_is() -> None:
    block = nn.Sequential(_conv(), _conv()).eval()
    weight = block[0].weight.detach().clone()  # type: ignore[operator]
    candidate = started(_kind("part_of"), block, X_NCHW)
    assert torch.equal(candidate[0].weight, weight)  # type: ignore[index, arg-type]
    with torch.no_grad():
        candidate[0].weight.zero_()  # type: ignore[index, union-attr, operator]
    assert torch.equal(block[0].weight, weight)  # type: ignore[arg-type]


def test_a_method_inherit_sees_inputs_and_a_block_of_its_own() -> None:
    conv, x_nchw = _conv(), X_NCHW.clone()
    state = {name: value.clone() for name, value in conv.state_dict().items()}
    candidate = build_candidate(_kind("mean"), conv)
    init_candidate(_kind("mean"), candidate, conv, x_nchw)
    with torch.no_grad():
        expected = conv(X_NCHW).mean((0, 2, 3))
    torch.testing.assert_close(candidate.mean.detach(), expected)  # type: ignore[operator, union-attr]
    assert candidate.training
    assert torch.equal(x_nchw, X_NCHW)
    assert all(torch.equal(value, conv.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_kind("f", "nowhere.at_all"), "kind nowhere.at_all:f: there is no module nowhere beside"),
        (_kind("f", OWN), "tests.blocks.own_kinds has no function f"),
        (_kind("boom"), r"boom\(block\) of a Conv2d: ZeroDivisionError: boom; where it does not"),
        (_kind("thin", hight=3), r"thin\(block, hight=3\) of a Conv2d: TypeError: .*hight"),
        (_kind("no_module"), r"no_module\(block\) gives int, expected a torch.nn.Module"),
        (_kind("failing_inherit"), r"failing_inherit: inherit\(block, x_nchw\): ZeroDivision"),
    ],
)
def test_code_that_fails_ends_the_run_by_name(config: CustomConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        started(config, _conv(), X_NCHW)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_kind("by_weights"), "another structure where the block's weights differ"),
        (_kind("other_channels"), r"by?.*cannot take \(2, 8, 6, 6\): RuntimeError"),
        (_kind("two_outputs"), "whose output is tuple, expected one tensor"),
    ],
)
def test_a_module_of_no_use_is_refused(config: CustomConfig, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CandidateError, match=said):
        settle_candidate(config, _conv(), X_NCHW)


def test_a_block_that_it_does_not_fit_is_told_and_others_go_on() -> None:
    net = nn.Sequential(_conv(), _conv(stride=2))
    config = BlocksConfig(candidates=(_kind("thin"), _kind("other_shape")))
    discovery = find_blocks(net, config, X_NCHW)
    (block,) = discovery.blocks
    assert [c.name for c in block.candidates] == [f"{OWN}.thin"]
    assert block.rejected[0].reason == "gives (1, 3, 6, 6), the block (1, 8, 6, 6)"
    assert "`thin` stands for convolutions without stride" in discovery.refused[0].reason


def test_a_missing_module_ends_discovery() -> None:
    config = BlocksConfig(candidates=(_kind("f", "nowhere"),))
    with pytest.raises(ConfigError, match="no module nowhere"):
        find_blocks(nn.Sequential(_conv()), config, X_NCHW)


# ---------------------------------------------------------------- its code


def _card() -> ModelCard:
    return ModelCard(
        network=NetworkSpec(name="vgg_small", num_classes=4, in_channels=3, width=0.25),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        image_size=(8, 8),
        class_names=("a", "b", "c", "d"),
        augment=AugmentConfig(),
        data_digest="data",
        digest="teacher",
    )


BLOCK = "features.3"


def _save_student(folder: Path, config: CustomConfig) -> Classifier:
    teacher = build_classifier(_card()).eval()
    weights = {BLOCK: build_candidate(config, teacher.net.get_submodule(BLOCK)).state_dict()}
    student = stitch(teacher, {BLOCK: config}, weights)
    save_model(folder, student, _card().model_copy(update={"replacements": {BLOCK: config}}))
    return student


def test_a_student_with_code_of_the_users_loads_only_where_that_is_allowed(
    tmp_path: Path,
) -> None:
    student = _save_student(tmp_path, _kind("thin"))
    with pytest.raises(CandidateError, match=f"block {BLOCK}: .*:thin` .* pass allow_code=True"):
        load_model(tmp_path)
    loaded, _ = load_model(tmp_path, allow_code=True)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(loaded(images), student(images))


def test_code_that_is_not_there_is_not_imported_without_permission(tmp_path: Path) -> None:
    _save_student(tmp_path, _kind("thin"))
    card = tmp_path / "model.json"
    card.write_text(card.read_text().replace(OWN, "nowhere"))
    with pytest.raises(CandidateError, match="allow_code=True"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="there is no module nowhere"):
        load_model(tmp_path, allow_code=True)


def test_changed_code_is_another_trainee_and_refuses_old_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "changing_kind.py"
    code.write_text((Path(__file__).parent / "own_kinds.py").read_text())
    config, keys = _kind("thin", "changing_kind"), []
    block = _conv()
    for _ in range(2):
        settled = settle_candidate(config, block, X_NCHW)
        assert isinstance(settled, CustomConfig)
        assert len(settled.code) == 64
        spec = TraineeSpec.make("0", settled, 0, _card(), DistillConfig(), {})
        assert spec.name == "0/changing_kind.thin"
        keys.append(spec.key)
        _save_student(tmp_path / "student", settled)
        code.write_text(code.read_text() + "\n# changed\n")
    assert keys[0] != keys[1]
    with pytest.raises(CandidateError, match=f"block {BLOCK}: the code of changing_kind:thin is"):
        load_model(tmp_path / "student", allow_code=True)
