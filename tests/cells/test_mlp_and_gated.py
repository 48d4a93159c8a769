"""The MLP and the gated cell in torch: equations, gradients, both backends, training, options."""

import pytest
import torch
import torch.nn.functional as F

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, Implicit, Picard, Status, Unrolled
from tritondeq.cells import MLP, Affine, Gated, Monotone

MLPS = [(form, activation) for form in ("post", "pre") for activation in ("relu", "gelu", "silu", "swiglu")]
MAKE = {
    f"{form} {act}": lambda form=form, act=act, **o: MLP(6, 4, form=form, activation=act, **o) for form, act in MLPS
}
MAKE |= {"no bias": lambda **o: MLP(6, 4, hidden=3, bias=False, **o), "gated": lambda **o: Gated(6, 4, **o)}
MAKE |= {"gated, no bias": lambda **o: Gated(6, 4, bias=False, **o)}


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def equation(cell, z, x):
    """f as the docstrings have it."""
    w = dict(cell.named_parameters())

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    if isinstance(cell, Gated):
        ur, us, uc = linear("input", x).split(cell.features, -1)
        wr, ws, wc = cell.weight_r, cell.weight_s, cell.weight_c
        r, s = torch.sigmoid(z @ wr.T + ur), 0.5 + torch.sigmoid(z @ ws.T + us) / 2
        return (1 - s) * z + s * torch.tanh((r * z) @ wc.T + uc)
    u = rms(linear("input", x)) * w["norm.weight"]
    n = z + u if cell.form == "post" else rms(z)
    if cell.activation == "swiglu":
        h = F.silu(linear("gate", n)) * linear("up", n)
    else:
        h = getattr(F, cell.activation)(linear("up", n))
    out = u + linear("down", h)
    return rms(z + out) * w["outer"] if cell.form == "post" else torch.sigmoid(w["decay"]) * z + out


@pytest.fixture(params=MAKE)
def cell(request):
    cell = MAKE[request.param](dtype=torch.float64)
    with torch.no_grad():
        for p in cell.parameters():  # no parameter is at a special value
            p += 0.05 * torch.randn_like(p)
    return cell


def test_the_equation_and_its_gradients(cell):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = DEQ(cell, tol=1e-13, max_steps=500)
    z = layer(x)
    assert z.shape == (2, 3, 6) and layer.last.converged.all()
    torch.testing.assert_close(z, equation(cell, z, x), rtol=0, atol=1e-11)
    mine = torch.autograd.grad(z.sin().sum(), [x, *cell.parameters()])
    # autograd through the formula, iterated
    far = torch.zeros(2, 3, 6, dtype=torch.float64)
    for _ in range(200):
        far = equation(cell, far, x)
    theirs = torch.autograd.grad(far.sin().sum(), [x, *cell.parameters()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: layer(x), x)


@pytest.mark.parametrize("solver", [Picard(0.8), Anderson(), Broyden()], ids=repr)
def test_every_solver(cell, solver):
    x = torch.randn(5, 4, dtype=torch.float64)
    settings = {"tol": 1e-11, "max_steps": 500}
    results = []
    for layer in (DEQ(cell, solver=solver, **settings), DEQ(cell, adjoint=Unrolled(200), max_steps=200)):
        z = layer(x)
        results.append([z, *torch.autograd.grad(z.sin().sum(), list(cell.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2), Anderson()], ids=repr)
def test_kernels_agree_with_torch(name, solver):
    """Anderson(5) takes the loop with fused steps, the others one launch."""
    cell, x, results = MAKE[name](), torch.randn(3, 3, 4), []
    exact = MAKE[name](dtype=torch.float64)
    exact.load_state_dict(cell.state_dict())
    truth = DEQ(exact, tol=1e-13, max_steps=500)(x.double())
    for backend in ("torch", "triton"):
        with tdeq.backend(backend):
            layer = DEQ(cell, solver=solver, tol=1e-6, max_steps=200)
            z = layer(x)
            grads = torch.autograd.grad(z.sin().sum(), list(cell.parameters()))
        assert layer.last.converged.all() and layer.last.adjoint.converged.all()
        torch.testing.assert_close(z.double(), truth, rtol=0, atol=5e-5)
        results.append([z, *grads])
    assert layer.last.path.startswith("loop") == (solver == Anderson())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_tolerance_decides_how_many_terms_must_fit():
    """32,768 weights: two terms of them fit, three do not."""
    with tdeq.backend("triton"), torch.no_grad():
        for tol, path in ((1e-3, "one Triton launch"), (1e-6, "loop, one launch a step")):
            layer = DEQ(MLP(64, hidden=256), tol=tol, max_steps=2)
            layer(torch.randn(2, 64))
            assert layer.last.path.startswith(path)
        assert "196608 bytes of weights in 3 bf16 terms" in layer.last.path


@pytest.mark.parametrize("name", ["post gelu", "pre swiglu", "gated"])
def test_bf16_operands_round_weights_and_nothing_else(name):
    rounded, exact = MAKE[name](operands="bf16"), MAKE[name]()
    with torch.no_grad():
        for key, p in rounded.named_parameters():
            if key.startswith(("weight_", "up.w", "down.w", "gate.w")):
                p.copy_(p.bfloat16().float())
    exact.load_state_dict(rounded.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(DEQ(rounded, tol=1e-6)(x), DEQ(exact, tol=1e-6)(x))
    assert DEQ(rounded)(x) is not None and rounded.default_tol() == 1e-2


@pytest.mark.parametrize("name", ["post gelu", "pre swiglu", "gated"])
def test_rows_do_not_depend_on_their_batch(name):
    cell, x = MAKE[name](dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    layer = DEQ(cell, tol=1e-6)
    whole = layer.solve(x)
    for i in range(6):
        one = layer.solve(x[i : i + 1])
        torch.testing.assert_close(one.value[0], whole.value[i], rtol=1e-12, atol=1e-12)
        assert one.steps[0] == whole.steps[i]


def test_the_gate_has_no_gradient_at_an_equilibrium():
    cell = Gated(6, dtype=torch.float64)
    z = DEQ(cell, tol=1e-13, max_steps=500)(torch.randn(5, 6, dtype=torch.float64))
    grads = torch.autograd.grad(z.sum(), [cell.weight_s, cell.weight_r])
    assert grads[0].abs().max() < 1e-11 < 1e-3 < grads[1].abs().max()


def test_contraction_of_the_gated_cell_holds():
    cell = Gated(8, contraction=0.9, dtype=torch.float64)
    with torch.no_grad():
        cell.parametrizations.weight_c.original.mul_(20)
        cell.parametrizations.weight_r.original.mul_(20)
    layer, x = DEQ(cell, tol=1e-9, max_steps=1000), torch.randn(50, 8, dtype=torch.float64)
    z = layer(x)
    u, w = cell.inject(x)
    starts = torch.rand(50, 8, dtype=torch.float64) * 2 - 1
    assert layer.last.converged.all() and torch.allclose(layer(x, starts), z, atol=1e-7)
    gru = torch.func.vmap(torch.func.jacrev(lambda z, u: tdeq.kernels.formulas.gru(w, u.chunk(3), z[None])[2][0]))
    norms = torch.linalg.matrix_norm(gru(starts, u), 2)
    assert norms.max() <= 0.9 and torch.linalg.matrix_norm(cell.weight_c, 2) > 0.7


CALM = {
    "MLP, post": lambda: MLP(32),
    "MLP, pre, swiglu": lambda: MLP(32, form="pre", activation="swiglu"),
    "Gated": lambda: Gated(32, contraction=0.9),
    "Monotone": lambda: Monotone(32),
    "Affine": lambda: Affine(32, contraction=0.95),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CALM)
def test_training_stays_calm(name, autocast):
    """300 steps of regression on a rotated sphere; no solve ends but at its tolerance or at the precision's floor."""
    cell = CALM[name]()
    layer, head = DEQ(cell, max_steps=60), torch.nn.Linear(32, 8)
    opt = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-3)
    mix, losses, steps = torch.randn(32, 8) / 32**0.5, [], []
    for _ in range(300):
        x = torch.randn(64, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.mse_loss(head(layer(x)).float(), torch.tanh(2 * x @ mix))
        opt.zero_grad()
        loss.backward()
        opt.step()
        for solution in (layer.last, layer.last.adjoint):
            assert torch.isin(solution.status, torch.tensor([Status.CONVERGED, Status.PLATEAU])).all()
        steps.append(layer.last.steps.max().item())
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20]), (losses[0], losses[-1])
    assert max(steps) <= 40


def test_weight_norm_of_torch_is_computed_once_a_solve(monkeypatch):
    cell = MLP(6)
    torch.nn.utils.parametrizations.weight_norm(cell.up)
    calls = []
    forward = cell.up.parametrizations.weight[0].forward
    monkeypatch.setattr(cell.up.parametrizations.weight[0], "forward", lambda *w: calls.append(1) or forward(*w))
    DEQ(cell, adjoint=Implicit())(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 1 and cell.up.parametrizations.weight.original0.grad.norm() > 0


def test_repr_names_the_options():
    assert "form='pre'" in repr(MLP(4, form="pre")) and "operands='bf16'" in repr(Gated(4, operands="bf16"))


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: MLP(0), ValueError, "features"),
        (lambda: MLP(4, hidden=0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: MLP(4, form="both"), ValueError, "form.*post, pre.*'both'"),
        (lambda: MLP(4, activation="elu"), ValueError, "activation.*swiglu.*'elu'"),
        (lambda: MLP(4, operands="int8"), ValueError, "operands"),
        (lambda: MLP(4, norm=True), TypeError, "norm"),
        (lambda: Gated(4.0), TypeError, "features"),
        (lambda: Gated(4, 0), ValueError, "inputs"),
        (lambda: Gated(4, operands="int8"), ValueError, "operands"),
        (lambda: Gated(4, contraction=-1), ValueError, "contraction must be above 0, got -1"),
        (lambda: DEQ(Gated(4, 3))(torch.zeros(2, 4)), ValueError, "3 features"),
        (lambda: DEQ(MLP(4))(torch.zeros(2, 4).long()), TypeError, "floating-point"),
    ],
)
def test_bad_options_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
