"""`DEQ(..., graph=True)` without a GPU: in place of a replay, the work itself runs again on the same tensors.

That tests what is copied where, when a captured point is stale, and what is refused; not CUDA's part.
"""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import torch
from replays import HERE, THERE, Cuda, Recorder
from torch import nn

import tritondeq as tdeq
from tritondeq import DEQ, Anderson, Broyden, FixedDropout, Implicit, Neumann, OneStep, Phantom, Picard, Unrolled
from tritondeq.cells import Affine
from tritondeq.kernels import launch
from tritondeq.kernels.steps.affine import AffineSteps

WIDTH = 6
HOW = ("graphs of 3 steps", "one graph")
BOTH = pytest.mark.parametrize("recorded", [False, True], indirect=True, ids=["chunks", "while"])


@pytest.fixture(autouse=True)
def recorded(monkeypatch, request):
    """Solves replay in chunks, or where the parameter is true by a WHILE node."""
    monkeypatch.setattr(tdeq.cuda_graphs, "Recorder", Recorder)
    monkeypatch.setattr(Recorder, "repeats", getattr(request, "param", False))
    monkeypatch.setattr(tdeq.cuda_graphs, "can_record", lambda device: True)
    Recorder.made = 0
    with tdeq.backend("triton"):
        yield


class Cell(nn.Module):
    def __init__(self, dropout=0.0, linear=None):
        super().__init__()
        self.linear, self.dropout = linear or nn.Linear(WIDTH, WIDTH), FixedDropout(dropout)
        nn.init.normal_(self.linear.weight, std=0.2)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


def pair(cell=None, **options):
    """(captured, plain) with weights of the same values."""
    cell = Cell() if cell is None else cell
    options = {"tol": 1e-2, "max_steps": 12} | options
    return DEQ(copy.deepcopy(cell), graph=True, **options), DEQ(cell, **options)


def both(layers, work):
    """Runs `work` on each layer from the same seed; the results must be close. Returns the first."""
    results = []
    for layer in layers:
        torch.manual_seed(5)
        results.append(work(layer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return results[0]


def inputs(*scales, rows=2):
    return [(s * torch.randn(rows, WIDTH)).requires_grad_() for s in scales]


def captures(layer) -> int:
    return len(layer._graphs.solves)


@pytest.mark.parametrize(
    "solver, adjoint, recorded",
    [
        (Picard(), Implicit(), False),
        (Picard(), Implicit(), True),
        (Picard(damping=0.8), Phantom(4, 0.7), True),
        pytest.param(
            *(Anderson(memory=2), Implicit(solver=Picard(), tol=1e-3, max_steps=15), False), marks=pytest.mark.slow
        ),
        pytest.param(Broyden(memory=2), Implicit(), True, marks=pytest.mark.slow),
    ],
    ids=["chunks", "while", "phantom", "anderson", "broyden"],
    indirect=["recorded"],
)
def test_values_steps_and_gradients(solver, adjoint):
    """Two calls before one backward, then all again with other inputs: nothing new is captured."""
    layers = pair(solver=solver, adjoint=adjoint)

    def work(layer):
        out = []
        for x, y in (inputs(1.0, 2.0), inputs(0.3, 0.1)):
            first, second = layer.solve(x), layer.solve(y)
            loss = (first.value * second.value.exp()).sum()
            grads = torch.autograd.grad(loss, [x, y, *layer.parameters()])
            out += [first.value, second.value, first.steps, second.steps, first.residual, first.status, *grads]
        return out

    both(layers, work)
    chunks = lambda solver: HOW[0] if isinstance(solver, Picard) else HOW[0].replace("3", "4")  # noqa: E731
    assert (HOW[1] if Recorder.repeats else chunks(solver)) in layers[0].last.why
    assert layers[1].last.route is not tdeq.Route.GRAPH
    if isinstance(adjoint, Implicit):
        assert layers[0].last.adjoint.why == chunks(adjoint.solver or solver), "autograd is called between the steps"
    made = Recorder.made
    layers[0](*inputs(0.5)).sum().backward()
    assert captures(layers[0]) == 1 and Recorder.made == made


@pytest.mark.parametrize("adjoint", [Neumann(3), OneStep()], ids=str)
def test_other_adjoints(adjoint):
    both(pair(adjoint=adjoint), lambda layer: torch.autograd.grad(layer(*inputs(1.0)).sum(), list(layer.parameters())))


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("most, solver", [(1, Picard()), (2, Picard()), (4, Picard()), (3, Broyden(memory=2))], ids=str)
def test_most_steps_that_fill_no_chunk(most, solver):
    def work(layer):
        solution = layer.solve(inputs(1.0)[0])
        return [solution.steps, solution.status, solution.value, solution.residual]

    steps, status, *_ = both(pair(max_steps=most, tol=1e-9, solver=solver), work)
    assert (steps == most).all() and (status == tdeq.Status.MAX_STEPS).all()
    assert Recorder.made == (1 if Recorder.repeats else 3), "no gradient, no adjoint solve"


@torch.no_grad()
@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2), Broyden(memory=2)], ids=str)
def test_a_chunk_ends_with_the_buffers_it_began_with(solver):
    """A replay writes to the places of its capture, whatever was replayed before it."""
    layer, _ = pair(solver=solver)
    layer(torch.randn(2, WIDTH))
    (captured,) = layer._graphs.solves.values()
    steps = captured.forward.steps

    def places():
        return [getattr(steps, name).data_ptr() for name in ("z", "prev", "next", "best")]

    before = places()
    captured.forward.more()
    assert places() == before
    steps.onward()
    assert places() != before


def test_a_call_is_not_kept_alive():
    """Neither its input, with the graph behind it, nor its solution, once the caller has let go."""
    layer, _ = pair()
    before = inputs(1.0)[0] * 2
    watched = weakref.ref(before)
    z = layer(before)
    z.sum().backward(retain_graph=True)
    points = [weakref.ref(p) for p in gc.get_objects() if type(p) is tdeq.cuda_graphs.CapturedPoint]
    del before, z
    gc.collect()
    assert watched() is None and points and all(p() is None for p in points)


def test_training_in_place():
    """An optimizer updates the parameters under the captured graphs."""
    layers = pair()

    def work(layer):
        optimizer, losses, (x,) = torch.optim.SGD(layer.parameters(), lr=0.3), [], inputs(1.0)
        for _ in range(4):
            losses.append(layer(x).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return losses

    losses = both(layers, work)
    assert losses[-1] < losses[0] and captures(layers[0]) == 1


def test_weights_that_move_are_captured_again():
    layer, _ = pair()
    (x,) = inputs(1.0)
    first = layer(x)
    layer.cell.linear.weight.data = 0.5 * layer.cell.linear.weight.data
    assert not torch.allclose(layer(x), first) and captures(layer) == 2


def test_retained_graphs_and_backwards_out_of_order():
    def work(layer):
        x, y = inputs(1.0, 3.0)
        a, b = layer(x).sin().sum(), layer(y).sin().sum()
        ga = torch.autograd.grad(a, [x, *layer.parameters()], retain_graph=True)
        gb = torch.autograd.grad(b, [y, *layer.parameters()])
        layer(2 * y.detach())
        again = torch.autograd.grad(a, [x, *layer.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(ga, again, strict=True))
        return [*ga, *gb]

    both(pair(), work)


@BOTH
def test_a_backward_pass_in_another_thread():
    """Which is in no block that chooses the backend, as autograd's own thread on CUDA."""

    def work(layer):
        x, y = inputs(1.0, 2.0)
        loss = (layer(x) * layer(y)).sum()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.autograd.grad, loss, [x, y, *layer.parameters()]).result()

    layers = pair()
    both(layers, work)
    assert [layer.last.adjoint.route for layer in layers] == [tdeq.Route.GRAPH, tdeq.Route.FUSED]


def test_dropout_masks_are_those_of_the_call():
    layers = pair(Cell(dropout=0.5))

    def work(layer):
        x, y = inputs(1.0, 1.0)
        a, b = layer(x), layer(y)
        return [a, b, *torch.autograd.grad((a * b).sum(), [x, y, *layer.parameters()])]

    both(layers, work)
    assert captures(layers[0]) == 1
    (x,) = inputs(1.0)
    assert not torch.allclose(layers[0](x), layers[0](x))


def test_masks_and_starts():
    layers = pair()

    def work(layer):
        out = []
        for mask in (torch.rand(2, WIDTH) > 0.3, torch.rand(2, WIDTH) > 0.6):
            (x,) = inputs(1.0)
            solution = layer.solve(x, z0=torch.randn(2, WIDTH), mask=mask)
            out += [solution.value, solution.steps, *torch.autograd.grad(solution.value.sum(), [x])]
        return out

    both(layers, work)
    assert captures(layers[0]) == 1


def test_autocast():
    values = []
    for layer in pair():
        torch.manual_seed(5)
        (x,) = inputs(1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values.append(layer(x))
        values[-1].sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    torch.testing.assert_close(*values, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_each_shape_is_captured_and_the_oldest_forgotten(monkeypatch):
    monkeypatch.setattr(tdeq.cuda_graphs, "CACHE", 2)
    layer, _ = pair(max_steps=3)
    for rows in (1, 2, 3):
        layer(torch.zeros(rows, WIDTH))
    made = Recorder.made
    layer(torch.zeros(3, WIDTH))
    assert captures(layer) == 2 and Recorder.made == made
    layer(torch.zeros(1, WIDTH))
    assert captures(layer) == 2 and Recorder.made > made


def test_each_memory_format_is_captured():
    layers = pair(Cell(linear=nn.Conv2d(2, 2, 3, padding=1)))
    x = torch.randn(2, 2, 3, 4)
    for form in (torch.contiguous_format, torch.channels_last):
        z0 = torch.zeros_like(x, memory_format=form)
        z = both(layers, lambda layer, z0=z0: [layer(x, z0=z0)])[0]
        assert z.is_contiguous(memory_format=form)
    assert captures(layers[0]) == 2


def test_a_cell_that_cannot_be_captured(monkeypatch):
    """The error names the way out, nothing is stored, and the layer goes on."""
    layer, _ = pair()
    (x,) = inputs(1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "__call__", Mock(side_effect=RuntimeError("operation not permitted")))
        with pytest.raises(RuntimeError, match="can't be captured.*graph=False.*not permitted"):
            layer(x)
    assert not captures(layer)
    assert layer(x).isfinite().all()


def test_a_tensor_from_elsewhere_is_refused():
    layer, _ = pair()
    layer.cell.outside = [torch.ones(WIDTH, requires_grad=True) * 2]
    layer.cell.forward = lambda z, x: torch.tanh(0.3 * z * layer.cell.outside[0] + x)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(6,\).*Pass it in x"):
        layer(inputs(1.0)[0])


@torch.no_grad()
def test_what_is_not_a_tensor_is_part_of_the_key():
    class Scaled(nn.Module):
        def forward(self, z, injection):
            x, factor = injection
            return torch.tanh(sum(factor) * z + x) if isinstance(factor, bytearray) else torch.tanh(factor * z + x)

    layer, x = DEQ(Scaled(), graph=True, tol=1e-5), torch.ones(2, 3)
    for factor in (0.5, 0.1):
        z = layer((x, factor), z0=torch.zeros_like(x))
        assert torch.allclose(torch.tanh(factor * z + x), z, atol=1e-4)
    assert captures(layer) == 2
    with pytest.raises(TypeError, match="hashable values in x.*bytearray"):
        layer((x, bytearray(b"a")), z0=torch.zeros_like(x))


def test_second_derivatives_raise():
    layer, _ = pair()
    (x,) = inputs(1.0)
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="graph=False"):
        g.sum().backward()


def test_a_frozen_layer_has_no_gradient():
    layer, _ = pair()
    assert not layer.requires_grad_(False)(torch.zeros(2, WIDTH)).requires_grad


def test_copies_and_pickles_leave_the_captures_behind():
    layer, _ = pair()
    (x,) = inputs(1.0)
    z = layer(x)
    again = copy.deepcopy(layer)
    assert not captures(again) and torch.allclose(again(x), z)


def test_elsewhere_it_is_the_loop(monkeypatch):
    monkeypatch.undo()
    layer = DEQ(Cell(), graph=True)
    layer(inputs(1.0)[0]).sum().backward()
    assert "graphs are for CUDA" in layer.last.why


@pytest.mark.parametrize(
    "options, words",
    [
        ({"adjoint": Unrolled(3)}, "adjoint Unrolled"),
        ({"trace": True}, "trace=True"),
        ({"group": object()}, "group"),
        ({"solver": Broyden(), "adjoint": Implicit(reuse=True)}, "reuse=True"),
    ],
)
def test_what_does_not_go_together(options, words):
    with pytest.raises(ValueError, match=f"graph=True can't be combined with.*{words}"):
        DEQ(Cell(), graph=True, **options)


@pytest.mark.slow  # the kernel is for more than 256 features, in the interpreter
@pytest.mark.parametrize("operands, recorded", [("fp32", False), ("bf16", True)], indirect=["recorded"])
@pytest.mark.filterwarnings("ignore:a backward solve")  # some are cut short, on purpose
def test_a_cell_whose_steps_evaluate_it_themselves(monkeypatch, operands):
    """Two calls before one backward, then again with other inputs and weights."""
    monkeypatch.setattr(launch, "TILES", {terms: ((16, 128, 64, 2),) * 3 for terms in (1, 2, 3)})
    layers = pair(Affine(257, 4, operands=operands), tol=1e-4, max_steps=4)

    def work(layer):
        out = []
        for scale in (1.0, 0.3):
            x, y = torch.randn(2, 4).requires_grad_(), scale * torch.randn(2, 4)
            first, second = layer.solve(x), layer.solve(y)
            grads = torch.autograd.grad((first.value * second.value).sum(), [x, *layer.parameters()])
            out += [first.value, second.value, first.steps, second.steps, first.residual, first.status, *grads]
            with torch.no_grad():
                layer.cell.weight.mul_(0.5)
        return out

    both(layers, work)
    assert layers[0].last.why == f"{HOW[Recorder.repeats]}, one launch a step and its GEMM"
    assert layers[1].last.why == "one launch a step and its GEMM, interpreted"
    assert layers[0].last.adjoint.why == HOW[Recorder.repeats], "a kernel takes the steps of both"
    (solve,) = layers[0]._graphs.solves.values()
    assert type(solve.forward.steps) is type(solve.adjoint.steps) is AffineSteps


@pytest.mark.parametrize("case", ["captured", "body fails", "warm-up"])
def test_a_loop_is_a_while_node_that_is_closed_where_the_body_fails(monkeypatch, case):
    """What is asked of CUDA, in order; outside of a capture the body runs once."""
    monkeypatch.undo()
    graph, going = Mock(), torch.tensor(True)
    graph.get_currently_capturing_graph.return_value = graph
    graph.body.side_effect = RuntimeError("not permitted") if case == "body fails" else None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", Mock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: case != "warm-up")
    record = tdeq.cuda_graphs.Recorder(torch.device("cuda"))
    assert record.repeats
    with pytest.raises(RuntimeError, match="not permitted") if case == "body fails" else nullcontext():
        record.repeat(going, graph.body)
    begin = [call.get_currently_capturing_graph(), call.begin_capture_to_while_node(going), call.body()]
    again, end = call.set_conditional_handle_for_current_node(going), call.end_capture_to_conditional_node()
    asked = {"captured": [*begin, again, end], "body fails": [*begin, end], "warm-up": [call.body()]}
    assert graph.mock_calls == asked[case]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {}))  # older torch: the host repeats
    assert not tdeq.cuda_graphs.Recorder(torch.device("cuda")).repeats


def test_work_is_captured_on_a_stream_of_its_own_device(monkeypatch):
    """All of one recorder's on the same, so that autograd finds the stream of the forward; other threads go on."""
    monkeypatch.undo()
    Cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    streams, graphs = [], Mock(return_value=nullcontext())

    def stream(device=None):
        streams.append(Mock(device=device or torch.cuda.current_device()))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock())
    monkeypatch.setattr(torch.cuda, "graph", graphs)
    records = [tdeq.cuda_graphs.Recorder(device) for device in (HERE, THERE)]
    for record in (*records, *records):
        record(Mock())
    used = [call.kwargs["stream"] for call in graphs.call_args_list]
    assert used[0] is used[2] and used[1] is used[3] and len({*map(id, used)}) == 2
    assert [one.device for one in used] == [HERE, THERE] * 2
    assert {call.kwargs["capture_error_mode"] for call in graphs.call_args_list} == {"thread_local"}
    assert {call.kwargs["pool"] for call in graphs.call_args_list} == {"pool"}


def test_whether_a_graph_is_being_captured_is_asked_of_the_tensors_device(monkeypatch):
    monkeypatch.undo()
    for capturing, there in ((HERE, True), (THERE, False)):
        Cuda(monkeypatch, capturing)
        assert tdeq.cuda_graphs.can_record(THERE) is there
    assert not tdeq.cuda_graphs.can_record(torch.device("cpu"))
