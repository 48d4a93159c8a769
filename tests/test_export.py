"""torch.export, torch.compile(fullgraph=True), ONNX: an unrolled layer is a plain net; a solve says why it is none."""

import contextlib
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import tritondeq as tdeq
from tritondeq import DEQ, FixedDropout, Picard, Unrolled

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compilers
WIDTH, STEPS = 8, 3
traced = pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch's compiler follows no unrolled net before 2.14")
UNROLL = r"layer\.unrolled\(steps\).*without fullgraph=True.*DEQ\(compile=True\)"


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0, wrap=lambda linear: linear):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), wrap(nn.Linear(WIDTH, WIDTH))
        self.dropout = FixedDropout(dropout)

    def forward(self, z, x):
        return self.norm(x + self.dropout(0.5 * torch.tanh(self.linear(z))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + 0.3 * torch.tanh(self.linear(self.norm(x)))


def converted():
    model = tdeq.to_equilibrium(nn.Sequential(*(Residual() for _ in range(4))), prelude=1, coda=1)
    for part in model.modules():
        if isinstance(part, DEQ):
            part.unrolled(STEPS)
    return model


def layer(cell, **options):
    return DEQ(cell, **options).unrolled(STEPS)


NETS = {
    "a user's cell": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(Block()), nn.Linear(WIDTH, 2)),
    "Affine": lambda: layer(tdeq.cells.Affine(WIDTH)),
    "MLP": lambda: layer(tdeq.cells.MLP(WIDTH)),
    "Transformer": lambda: layer(tdeq.cells.Transformer(WIDTH, heads=2)),
    "to_equilibrium": converted,
}
MORE = {
    "Affine with a bound": lambda: layer(tdeq.cells.Affine(WIDTH, contraction=0.9)),
    "Monotone": lambda: layer(tdeq.cells.Monotone(WIDTH)),
    "Gated": lambda: layer(tdeq.cells.Gated(WIDTH)),
    "Conv": lambda: layer(tdeq.cells.Conv(WIDTH)),
    "MultiScale": lambda: layer(tdeq.cells.MultiScale((WIDTH, 2 * WIDTH), WIDTH)),
}
OPTIONS = {
    "dropout": lambda: layer(Block(0.3)),
    "damping": lambda: layer(Block(), solver=Picard(0.7)),
    "weight norm": lambda: layer(Block(wrap=weight_norm)),
    "spectral norm": lambda: layer(Block(wrap=spectral_norm)).eval(),
    "Unrolled of weight norm": lambda: DEQ(Block(wrap=weight_norm), adjoint=Unrolled(STEPS)),
    "checkpoint": lambda: DEQ(Block()).unrolled(STEPS, checkpoint=True),
    "compile": lambda: layer(Block(), compile={"backend": "aot_eager"}),
}


def slow_but(names, *fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(name, rows=4):
    shape = {"Transformer": (5, WIDTH), "Conv": (WIDTH, 5, 5), "MultiScale": (WIDTH, 8, 8)}.get(name, (WIDTH,))
    return torch.randn(rows, *shape)


def leaves(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def same(out, right):
    assert all(torch.equal(a, b) for a, b in zip(leaves(out), leaves(right), strict=True))


def results(run, net, *inputs):
    """Values, and gradients to the weights."""
    torch.manual_seed(1)
    value = leaves(run(*inputs))
    return value + list(torch.autograd.grad(sum(v.sin().sum() for v in value), list(net.parameters())))


def exported(net, x, strict):
    name = "input" if isinstance(net, nn.Sequential) and type(net) is nn.Sequential else "x"
    return torch.export.export(net, (x,), strict=strict, dynamic_shapes={name: {0: torch.export.Dim("batch")}}).module()


@traced
@pytest.mark.parametrize("name", slow_but(NETS | OPTIONS, "weight norm"))
def test_fullgraph_is_eager_to_the_bit(name):
    net, x = (NETS | OPTIONS)[name](), drawn(name)
    same(results(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x), results(net, net, x))


@traced
def test_fullgraph_in_inference_mode():
    net, x = layer(Block()), drawn("")
    with torch.inference_mode():
        same(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=traced)], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", slow_but(NETS, "a user's cell"))
def test_an_exported_net_takes_any_batch(name, strict):
    net = NETS[name]().eval()
    module = exported(net, drawn(name), strict)
    for rows in (2, 4, 7):
        x = drawn(name, rows)
        same(module(x), net(x))


@traced
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_cell_compiles_and_is_exported(name):
    net, x = MORE[name](), drawn(name)
    convolves = name in ("Conv", "MultiScale")  # which adds in another order where its memory format is traced
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4) if convolves else same
    close(results(torch.compile(net, fullgraph=True, backend="aot_eager"), net, x), results(net, net, x))
    for strict in (False, True):
        module, other = exported(net, x, strict), drawn(name, 7)
        close(module(other), net(other))


@traced
@pytest.mark.slow
def test_inductor():
    net, x = layer(Block()), drawn("")
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(results(compiled, net, x), results(net, net, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_onnx(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = NETS[name]().eval()
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(net, (drawn(name),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for rows in (2, 7):
        x = drawn(name, rows)
        (value,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(value), net(x).detach())


@traced
def test_a_function_and_all_that_it_reports():
    w, x = (0.2 * torch.randn(WIDTH, WIDTH)).requires_grad_(), drawn("")

    def run(x):
        zeros = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        f = lambda z: ({"a": torch.tanh(z["b"] @ w + x), "b": 0.5 * z["a"]}, z["a"].square().mean())  # noqa: E731
        s = tdeq.fixed_point(f, zeros, adjoint=Unrolled(STEPS), trace=True, has_aux=True)
        return s.value["a"], s.value["b"], s.aux, s.residual, s.trace, s.steps, s.status

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    same(compiled(x), run(x))
    same(*(torch.autograd.grad(f(x)[0].sin().sum(), w) for f in (compiled, run)))


@traced
def test_one_graph_serves_all_calls_and_last_is_that_of_the_call():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net, x = layer(Block()), drawn("")
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for scale in (1.0, 2.0, 3.0):
        compiled(scale * x)
        last = net.last
        net(scale * x)
        assert last is not net.last and last.route is tdeq.Route.UNROLLED and last.steps.tolist() == [STEPS] * 4
        same([last.residual, last.status], [net.last.residual, net.last.status])
    assert len(graphs) == 1


@traced
def test_z0_has_a_gradient_and_stays_where_a_compiled_cell_changes_its_state():
    """Which eager refuses; no compiler reads version counters, so the cell gets a copy."""
    linear, x = nn.Linear(WIDTH, WIDTH), drawn("")
    z0 = torch.randn_like(x).requires_grad_()

    def run(z0, f):
        return tdeq.fixed_point(f, z0, solver=Picard(0.7), adjoint=Unrolled(STEPS)).value

    change = lambda z: torch.tanh(linear(z.mul_(0.5))) + x  # noqa: E731
    with pytest.raises(RuntimeError, match="f changes its state in place"):
        run(z0, change)
    before = z0.detach().clone()
    value = torch.compile(run, fullgraph=True, backend="aot_eager")(z0, change)
    right = run(z0, lambda z: torch.tanh(linear(z * 0.5)) + x)
    same([value, *torch.autograd.grad(value.sum(), z0)], [right, *torch.autograd.grad(right.sum(), z0)])
    same(z0.detach(), before)


# a solve


@pytest.mark.parametrize("throw", [False, True], ids=["solve", "unrolled with throw"])
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda net, x: torch.compile(net, fullgraph=True, backend="aot_eager")(x), marks=traced),
        lambda net, x: torch.export.export(net, (x,), strict=False),
        pytest.param(lambda net, x: torch.export.export(net, (x,), strict=True), marks=traced),
    ],
    ids=["fullgraph", "export", "strict export"],
)
def test_a_solve_says_what_to_do(run, throw):
    net, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), DEQ(Block(), throw=throw)), drawn("")
    if throw:
        net[1].unrolled(STEPS)
    with pytest.raises(RuntimeError, match=UNROLL), contextlib.redirect_stdout(io.StringIO()):
        run(net, x)
    net[1].throw = False
    net[1].unrolled(None)
    assert net[1].solve(x).converged.all()  # an error leaves nothing behind


@pytest.mark.slow
def test_onnx_of_a_solve_says_what_to_do():
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=UNROLL), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(DEQ(Block()).eval(), (drawn(""),), dynamo=True)


@pytest.mark.slow
def test_without_fullgraph_what_surrounds_a_solve_is_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.deq, self.leave = nn.Linear(WIDTH, WIDTH), DEQ(Block()), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.leave(self.deq(self.enter(x)))

    net, x = Net(), drawn("")
    same(results(torch.compile(net, backend=backend), net, x), results(net, net, x))
    assert sum("linear" in graph.code for graph in graphs) == 2 and net.deq.last.converged.all()
