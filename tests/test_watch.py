"""Watch reports what `last` of each layer has, waits for no step, and warns where solves fail."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritondeq as tdeq
from tritondeq import DEQ, Implicit, OneStep, Status, Unrolled, Watch


def net(**options) -> nn.Module:
    layers = {"core": DEQ(tdeq.cells.Affine(6), **options), "other": DEQ(tdeq.cells.MLP(6))}
    return nn.ModuleDict({"first": nn.Linear(3, 6), "last": nn.Linear(6, 1)} | layers)


def train(model, x, other=False):
    z = model["core"](model["first"](x))
    model["last"](model["other"](z) if other else z).sum().backward()


class Scaled(nn.Module):
    """z / (1 - x) is the limit, approached at the rate x."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, z, x):
        return x * z + self.one


class Reads(TorchDispatchMode):
    """Counts how often the host asks for one value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_report_is_the_sum_of_last(monkeypatch):
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(0) or tolist(tensor))
    model = net()
    watch, solutions = Watch(model, every=3), []
    for report_expected in (False, False, True) * 2:
        train(model, torch.randn(5, 3) * 3)
        solutions.append(model["core"].last)
        with Reads() as reads:
            report = watch.step()
        assert (report is not None) == report_expected
        assert reads.count == 0 and len(lists) == (4 if report_expected else 0), "only a report waits for the device"
        lists.clear()
        if report is None:
            continue
        steps = torch.cat([s.steps for s in solutions]).double()
        backward = torch.cat([s.adjoint.steps for s in solutions]).double()
        assert report == {
            "core/steps": pytest.approx(steps.mean().item()),
            "core/steps_max": steps.max().item(),
            "core/residual": pytest.approx(max(s.residual.max().item() for s in solutions)),
            "core/CONVERGED": 1.0,
            **{f"core/{status.name}": 0.0 for status in Status if status},
            "core/backward_steps": pytest.approx(backward.mean().item()),
            "core/backward_failed": 0.0,
        }
        solutions.clear()


def test_names_and_layers_that_are_not_called():
    model = net()
    watch = Watch(nn.Sequential(model), every=1)
    train(model, torch.randn(2, 3))
    assert {key.rpartition("/")[0] for key in watch.step()} == {"0.core"}
    train(model, torch.randn(2, 3), other=True)
    assert {key.rpartition("/")[0] for key in watch.step()} == {"0.core", "0.other"}
    assert watch.step() == {}, "nothing was called since"
    layer = DEQ(tdeq.cells.Affine(3), adjoint=OneStep())
    layer(torch.randn(2, 3))
    watch = Watch(layer, every=1)
    assert watch.step() == {}, "what went before does not count"
    layer(torch.randn(0, 3))
    assert watch.step() == {}
    layer(torch.randn(2, 3)).sum().backward()
    assert set(watch.step()) == {"steps", "steps_max", "residual", *(status.name for status in Status)}


def test_it_warns_once_until_it_is_well_again():
    layer = DEQ(Scaled(), max_steps=20)
    watch = Watch(layer, every=1, limit=0.25)
    hard, easy = torch.tensor([[0.1], [0.8], [0.1]]), torch.tensor([[0.1], [0.2], [0.3]])

    def step(x):
        layer(x)
        return watch.step()

    message = "33% of the solves of the layer failed .* most of them MAX_STEPS: max_steps .* tritondeq.diagnose"
    with pytest.warns(UserWarning, match=message) as caught:
        report = step(hard)
    assert report["MAX_STEPS"] == pytest.approx(1 / 3) and report["CONVERGED"] == pytest.approx(2 / 3)
    assert len(caught) == 1 and caught[0].filename == __file__
    step(hard), step(easy)  # any warning is an error
    with pytest.warns(UserWarning, match=message):
        step(hard)
    step(easy)
    with pytest.warns(UserWarning, match="100% of the solves .* most of them GROWING: The norm of the state runs away"):
        step(torch.tensor([[2.0], [3.0], [0.86]]))
    watch = Watch(layer, every=1, limit=None)
    assert step(hard)["MAX_STEPS"] > 0.3


@pytest.mark.filterwarnings("ignore:a backward solve")  # the pass itself, once
def test_it_warns_of_the_backward_pass():
    model = net(adjoint=Implicit(max_steps=1))
    watch = Watch(model, every=1)
    train(model, torch.randn(4, 3))
    with pytest.warns(UserWarning, match="100% of the backward solves of core failed .* MAX_STEPS"):
        assert watch.step()["core/backward_failed"] == 1


def test_a_warm_up_is_not_warned_of():
    layer = DEQ(tdeq.cells.Affine(4), adjoint=Unrolled(2))
    watch = Watch(layer, every=1)
    layer(torch.randn(3, 4)).sum().backward()
    report = watch.step()
    assert report["MAX_STEPS"] == 1 and report["steps"] == 2


@pytest.mark.parametrize("by_name", [False, True])
def test_radius(by_name):
    """It is that of the first forward pass in train() after a report, of what the mask counts."""
    layer = DEQ(Scaled())
    watch = Watch(layer, every=1, radius=True, limit=None)
    mask = torch.tensor([[True, False]])

    def call(x):
        layer(x=torch.tensor([[x, 5.0]]), mask=mask) if by_name else layer(torch.tensor([[x, 5.0]]), None, mask)

    with torch.no_grad():
        call(0.3)
    assert not layer._forward_hooks, "it has measured"
    call(0.6)
    assert watch.step()["radius"] == pytest.approx(0.3)
    layer.eval()
    call(0.6)
    layer.train()
    call(0.4)
    assert watch.step()["radius"] == pytest.approx(0.4)
    assert "radius" not in watch.step() | watch.step() and len(layer._forward_hooks) == 1, "it waits for a call"


def test_a_model_that_is_watched_can_be_copied():
    layer, x = DEQ(tdeq.cells.Affine(6)), torch.randn(2, 6)
    watch = Watch(layer, every=1, radius=True)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and watch.step()["radius"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got int 3"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model must hold a DEQ, got Linear without one"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"radius": 1}, TypeError, "radius must be a bool, got 1"),
        ({"limit": -0.1}, ValueError, "limit must be at least 0"),
        ({"limit": "a"}, TypeError, "limit must be a number"),
    ],
)
def test_bad_input(arguments, error, message):
    model = arguments.pop("model", DEQ(tdeq.cells.Affine(2)))
    with pytest.raises(error, match=message):
        Watch(model, **arguments)
    with pytest.raises(TypeError, match="trainer must be a Trainer of lightning or transformers, got list"):
        Watch(DEQ(tdeq.cells.Affine(2))).attach([])


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net()

    def forward(self, x, labels):
        y = self.model["last"](self.model["core"](self.model["first"](x)))[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


DATA = [{"x": torch.full((3,), i / 8), "labels": torch.tensor(0.5)} for i in range(16)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trainer's
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(Regression, lightning.LightningModule):
        def training_step(self, batch, index):
            return self(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    module = Module()
    watch = Watch(module, every=2, radius=True)
    assert watch.attach(trainer) is watch
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=4))
    assert watch.steps == 4
    assert_logged(trainer.logged_metrics)


def logged_by_transformers(folder, every=None, extra=(), **options):
    """(log of a run of 8 steps with a Watch each `every` steps, the Watch)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    options |= {"use_cpu": True, "max_steps": 8, "per_device_train_batch_size": 4, "report_to": []}
    arguments = transformers.TrainingArguments(str(folder), disable_tqdm=True, save_strategy="no", **options)
    data = {"train_dataset": DATA, "eval_dataset": DATA[:4]}
    trainer = transformers.Trainer(Regression(), arguments, callbacks=list(extra), **data)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    watch = every and Watch(trainer.model, every=every, radius=True).attach(trainer)
    trainer.train()
    return trainer.state.log_history, watch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trainer's
@pytest.mark.parametrize(("every", "steps"), [(1, 1), (2, 2), (4, 2), (2, 4), (3, 4)])
def test_transformers(tmp_path, every, steps):
    """Reports come at their steps, and what the trainer logs at its steps is what it logs without a Watch."""
    options = {"logging_steps": steps, "logging_first_step": True, "eval_strategy": "steps", "eval_steps": 4}
    log, watch = logged_by_transformers(tmp_path, every, **options)
    assert watch.steps == 8
    reports = [entry for entry in log if "model.core/steps" in entry]
    assert [entry["step"] for entry in reports] == list(range(every, 9, every))
    for entry in reports:
        assert_logged(entry)
    alone, _ = logged_by_transformers(tmp_path, **options)
    for key in ("loss", "grad_norm", "eval_loss"):
        got, want = ([(e["step"], e[key]) for e in entries if key in e] for entries in (log, alone))
        assert got == want and len(got) >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trainer's
@pytest.mark.parametrize("new", [False, True])
def test_transformers_callbacks_that_stop_at_a_report(tmp_path, new):
    """What others do to the trainer's control, as they see a report, counts."""
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def on_log(self, arguments, state, control, logs, **_):
            if "model.core/steps" in logs and state.global_step == 4:
                control = copy.copy(control) if new else control
                control.should_training_stop = True
                return control

    log, watch = logged_by_transformers(tmp_path, 2, [Stop()], logging_steps=4)
    assert watch.steps == 4 and [entry["step"] for entry in log if "loss" in entry] == [4]


def assert_logged(entry):
    assert entry["model.core/CONVERGED"] == 1 and 0 < entry["model.core/radius"] < 1
    assert entry["model.core/backward_steps"] > 1
