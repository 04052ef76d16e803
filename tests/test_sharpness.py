"""The curvature of a loss against automatic differentiation, and the rate that follows from it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import loss_settings, randomised
from torch import nn
from torch.nn.utils import parameters_to_vector

from lwm import losses, models, sharpness
from lwm.images.batches import Images, to_input

OLD = 4
CHANNELS = [0.5] * 3, [0.25] * 3


def test_the_largest_curvature_is_that_of_the_hessian_and_the_weights_stay():
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, OLD)).double(), torch.randn(20, 6).double()
    parameters, targets = list(network.parameters()), torch.randint(0, OLD, (20,))
    start = parameters_to_vector(parameters).detach()

    def loss():
        return nn.functional.cross_entropy(3 * network(inputs), targets)

    def loss_at(vector):
        named, at = {}, 0
        for name, parameter in network.named_parameters():
            named[name], at = vector[at : at + parameter.numel()].view_as(parameter), at + parameter.numel()
        return nn.functional.cross_entropy(3 * torch.func.functional_call(network, named, (inputs,)), targets)

    expected = torch.linalg.eigvalsh(torch.func.hessian(loss_at)(start)).max().item()
    assert sharpness.largest_curvature(loss, parameters) == pytest.approx(expected, rel=0.1)
    assert torch.equal(parameters_to_vector(parameters), start)


@pytest.mark.parametrize("form", ["softmax", "binary"])
def test_at_the_stable_rate_descent_returns_to_the_teacher_and_at_ten_times_the_rate_it_does_not(form):
    teacher = randomised("resnet32", OLD, 16).float().eval()
    student = copy.deepcopy(teacher)
    models.widen_head(student, 2)
    teacher.requires_grad_(False)
    images = Images(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), OLD + torch.arange(16) % 2)
    settings = loss_settings(loss_form=form)
    rate = sharpness.stable_rate(student, teacher, images, CHANNELS, OLD, settings)
    inputs = to_input(images.pixels, *CHANNELS)

    def distance_after_descent(rate):
        own = copy.deepcopy(student)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
        optimizer, distances = torch.optim.SGD(own.parameters(), rate), []
        for _ in range(15):
            terms = losses.distil(own(inputs), teacher(inputs), images.labels, OLD, settings)
            optimizer.zero_grad()
            terms["distillation"].backward()
            optimizer.step()
            distances.append(terms["distillation"].item())
        return distances[-1] / distances[0]

    assert distance_after_descent(rate) < 1
    assert not distance_after_descent(10 * rate) < 1


def test_without_distillation_the_rate_has_a_bound_all_the_same():
    torch.manual_seed(0)
    teacher = models.build("resnet32", OLD, 16).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    images = Images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([OLD, OLD + 1]))
    models.widen_head(student, 2)
    assert sharpness.stable_rate(student, teacher, images, CHANNELS, OLD, loss_settings(beta=0.0)) == sharpness.MOST
