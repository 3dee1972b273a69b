"""The losses against their formulas, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbkd.distill import damage_kl, distillation_loss, mse, relative_l2


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    output, target = (3 * torch.randn(2, 4, 5, generator=generator) for _ in range(2))
    return output, target


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over the rows of sum p ln(p / q)."""
    return float((p * np.log(p / q)).sum(1).mean())


def test_relative_l2_is_the_squared_error_over_the_squared_norm_of_the_target(pair):
    y, t = (x.numpy().astype(np.float64) for x in pair)
    assert float(relative_l2(*pair)) == pytest.approx(((y - t) ** 2).sum() / (t**2).sum(), rel=1e-5)


def test_relative_l2_does_not_depend_on_the_scale_and_is_1_for_an_output_of_0(pair):
    output, target = pair
    assert float(relative_l2(1000 * output, 1000 * target)) == pytest.approx(
        float(relative_l2(output, target)), rel=1e-5
    )
    assert float(relative_l2(torch.zeros_like(target), target)) == pytest.approx(1)


def test_relative_l2_of_a_target_of_0_is_finite_and_0_where_the_output_is_right():
    zero = torch.zeros(2, 3)
    assert float(relative_l2(zero, zero)) == 0


def test_mse_is_the_mean_over_all_elements(pair):
    y, t = (x.numpy().astype(np.float64) for x in pair)
    assert float(mse(*pair)) == pytest.approx(((y - t) ** 2).sum() / y.size, rel=1e-5)


def test_damage_is_the_kl_divergence_of_the_teacher_from_the_model_in_nats(pair):
    teacher, model = (x[:, :, 0] for x in pair)
    expected = kl(softmax(teacher.double().numpy()), softmax(model.double().numpy()))
    assert float(damage_kl(teacher, model)) == pytest.approx(expected, rel=1e-9)
    assert float(damage_kl(model, teacher)) != pytest.approx(expected, rel=1e-2)


def test_damage_of_a_certain_teacher_against_a_uniform_model_is_the_logarithm_of_the_classes():
    teacher = torch.tensor([[200.0, 0, 0, 0]])
    assert float(damage_kl(teacher, torch.zeros(1, 4))) == pytest.approx(np.log(4))


def test_damage_of_equal_logits_is_exactly_0(pair):
    logits = pair[0][:, :, 0]
    assert float(damage_kl(logits, logits.clone())) == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_is_the_softened_kl_divergence_times_the_squared_temperature(
    pair, temperature
):
    student, teacher = (x[:, :, 0] for x in pair)
    softened = [softmax(x.double().numpy() / temperature) for x in (teacher, student)]
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(
        temperature**2 * kl(*softened), rel=1e-5
    )
