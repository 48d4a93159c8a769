"""The worked example of CONTRIBUTING.md."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from close import assert_as_eager

from tritondeq import fixed_point
from tritondeq.kernels import dispatch, launch
from tritondeq.kernels.rules import CONVERGED


@pytest.fixture
def leaky(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    path = tmp_path / "leaky.py"
    path.write_text(example)
    monkeypatch.setattr(launch, "SHAPES", dict(launch.SHAPES))
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    spec = importlib.util.spec_from_file_location("leaky", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.kernels
def test_a_new_cell_is_its_step_its_adjoint_and_its_reference(leaky, device):
    w, a = 0.2 * torch.randn(12, 12, device=device), 0.5 + 0.5 * torch.rand(12, device=device)
    u, g = torch.randn(2, 37, 12, device=device)
    settings = {"tol": 1e-6, "max_steps": 200}
    for memory in (0, 2):
        z, _, _, status = leaky.leaky.solve(w, a, u, memory=memory, **settings)
        exact = leaky.leaky.solve_ref(w.double(), a.double(), u.double(), tol=1e-13, max_steps=999)[0]
        assert (status == CONVERGED).all()
        assert_as_eager(z, leaky.leaky.solve_ref(w, a, u, memory=memory, **settings)[0], exact, 2)

    x = u.double().requires_grad_()
    solved = fixed_point(lambda z: a.double() * torch.tanh(z @ w.double().T + x), exact, tol=1e-12, max_steps=999).value
    (expected,) = torch.autograd.grad(solved, x, g.double())  # S u*
    slope = (a.double() * (1 - torch.tanh(exact @ w.double().T + u.double()) ** 2)).float()
    found = leaky.leaky.adjoint(w, slope, g, **settings)[0]
    eager = leaky.leaky.adjoint_ref(w, slope, g, **settings)[0]
    assert_as_eager(slope * found, slope * eager, expected, 2)


def test_it_says_what_it_can_not_hold(leaky):
    assert "524288 bytes of weights do not fit" in leaky.refuses(shapes=[(512, 512)], terms=1)
    assert leaky.refuses(shapes=[(128, 128)], terms=2) is None
