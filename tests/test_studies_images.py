"""The study of images, and what explains them: clutter, attacks, Jacobians, effort, distances."""

import pytest
import torch
from torch import nn

import tritondeq as tdeq
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import explain, images
from tritondeq.bench.studies.study import Job
from tritondeq.toolbox import one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def test_a_cluttered_image_has_the_digit_it_is_said_to_have(monkeypatch):
    monkeypatch.setattr(images, "GRAIN", 0.0)
    digits = images.Data.split(0, CPU)
    x, y = images.clutter(digits.x[:50], digits.y[:50], 12, torch.Generator().manual_seed(0))
    assert x.shape == (12, 1, images.SIDE, images.SIDE)
    windows = x[:, 0].unfold(1, 8, 1).unfold(2, 8, 1).reshape(12, -1, 64)
    for own, label in zip(windows, y, strict=True):
        apart = torch.cdist(own, digits.x[:50].flatten(1)).amin(0)
        assert apart.min() == 0 and label in digits.y[:50][apart == 0]


def test_an_attack_stays_near_and_hurts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    moved = images.attacked(net, x, y, 0.05, 4)
    losses = [nn.functional.cross_entropy(net(at), y) for at in (x, x + 0.05 * torch.randn_like(x).sign(), moved)]
    assert losses[2] > 1.05 * losses[0] and losses[2] > losses[1] and not moved.requires_grad
    assert (moved - x).abs().max() <= 0.05 + 1e-6 and moved.min() >= 0 and moved.max() <= 1


def test_pushes_and_pulls_are_those_of_the_jacobian():
    study = explain.STUDY
    for contestant in (who.DEQ, who.STACK):
        net = explain.images.build(Job(explain.images.DIGITS, contestant, 0, study.settings["tiny"], CPU))
        net = explain.tightened(net)
        x, v = torch.rand(1, 1, 8, 8).double(), torch.randn(1, 1, 8, 8).double()
        j = torch.autograd.functional.jacobian(net.features, x).reshape(-1, 64)
        _, pushed, back = explain.push(net, x, v)
        assert torch.allclose(pushed.flatten(), j @ v.flatten(), rtol=1e-7)
        assert torch.allclose(back.flatten(), j.mT @ (j @ v.flatten()), rtol=1e-7)
        logits, slopes = explain.jacobian(net, x)
        assert torch.allclose(logits, net(x)) and slopes.shape == (1, 10, 64)
        assert torch.allclose(slopes, torch.autograd.functional.jacobian(net, x).reshape(1, 10, 64), rtol=1e-7)
        size = torch.linalg.matrix_norm(j, 2) * x.norm() / net.features(x).norm()
        told = explain.sensitivity(net, x)["stretch"]
        assert 0.8 * size < told <= (1 + 1e-9) * size


def test_the_residual_of_an_early_step_is_that_of_the_trace():
    job = Job(images.DIGITS, who.HYBRID, 0, images.STUDY.settings["tiny"], CPU)
    net, x = images.build(job), torch.rand(12, 1, 8, 8)
    logits = net(x)
    y = logits.argmax(1)
    y[explain.margins(logits).argsort()[:4]] += 1  # the margin tells all errors
    told = explain.hard(net, x, y, torch.zeros_like(x))
    assert told["margin_tells"] == 1 and told["misread"] == pytest.approx(100 / 3)
    net.body.core.max_steps, net.body.core.solver = explain.EARLY, tdeq.Anderson(memory=4)
    wrong = net(x).argmax(1) != y
    assert told["residual_tells"] == explain.auc(net.body.core.last.residual, wrong) is not None
    assert net.body.core.trace is False and told["effort_tells_noise"] == 0.5


def test_what_distance_foretells_of_a_linear_net():
    """Each image is pushed straight to its nearest border, all as far: those within reach flip, and no others."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    w = net[1].weight.data.mul_(torch.linspace(0.5, 1.5, 10)[:, None])
    x = torch.randn(40, 1, 8, 8).double()
    logits = net(x).detach()
    y = logits.argmax(1)
    distances = (logits.gather(1, y[:, None]) - logits) / (w[y][:, None] - w).norm(dim=2)
    distance, nearest = distances.nan_to_num(nan=torch.inf).min(1)
    toward = nn.functional.normalize(w[nearest] - w[y], dim=1)
    noise = (distance.median() * 1.001 * toward).view_as(x)
    told = explain.flips(net, x, y, noise, {"levels": [0.1], "noise": 1.0})
    assert told["distance_foretells"] == 1 > told["margin_foretells"] and told["linear"] < 1e-9
    assert told["slope"] == pytest.approx(torch.linalg.matrix_norm(w, 2).item())


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 3.0])
    assert explain.rank_correlation(a, a.exp()) == pytest.approx(1) == -explain.rank_correlation(a, -a)
    assert explain.rank_correlation(a, a * 0) is None


def test_the_area_under_the_curve():
    score, wrong = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1])
    assert explain.auc(score, wrong) == 1 and explain.auc(-score, wrong) == 0 and explain.auc(score, wrong * 0) is None
