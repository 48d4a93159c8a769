"""Watch reports what `last` of each layer has, waits for no step, and warns where solves fail."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritondeq as tdeq
from tritondeq import DEQ, Implicit, OneStep, Status, Unrolled, Watch


def net(**options) -> nn.Module:
    core = DEQ(tdeq.cells.Affine(6), **options)
    other = DEQ(tdeq.cells.MLP(6))
    return nn.ModuleDict({"first": nn.Linear(3, 6), "core": core, "other": other, "last": nn.Linear(6, 1)})


def train(model, x, other=False):
    z = model["core"](model["first"](x))
    if other:
        z = model["other"](z)
    model["last"](z).sum().backward()


class Scaled(nn.Module):
    """z / (1 - x) is the limit, approached at the rate x."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, z, x):
        return x * z + self.one


class Reads(TorchDispatchMode):
    """Counts how often the host asks for one value."""

    def __init__(self):
        super().__init__()
        self.count = 0

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
        steps, backward = (
            torch.cat([s.steps for s in which]).double() for which in (solutions, [s.adjoint for s in solutions])
        )
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


def test_shares_of_outcomes():
    layer = DEQ(Scaled(), tol=1e-5, max_steps=20)
    watch = Watch(layer, every=2, limit=0.5)
    for hard in (1, 5):
        layer(torch.tensor([0.1] * (10 - hard) + [0.9] * hard)[:, None])
        report = watch.step()
    assert report["CONVERGED"] == pytest.approx(0.7) and report["MAX_STEPS"] == pytest.approx(0.3)
    assert report["steps_max"] == 20


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

    message = "33% of the solves of the layer failed .* most of them MAX_STEPS: max_steps evaluations were not enough"
    with pytest.warns(UserWarning, match=message) as caught:
        assert step(hard)["MAX_STEPS"] == pytest.approx(1 / 3)
    assert (
        len(caught) == 1 and caught[0].filename == __file__ and "tritondeq.diagnose(layer, x)" in str(caught[0].message)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(hard)
        step(easy)
    with pytest.warns(UserWarning, match=message):
        step(hard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = Watch(layer, every=1, limit=None)
        assert step(hard)["MAX_STEPS"] > 0.3


def test_it_warns_of_the_backward_pass():
    model = net(adjoint=Implicit(max_steps=1))
    watch = Watch(model, every=2)
    train(model, torch.randn(4, 3))
    watch.step()
    train(model, torch.randn(4, 3))
    with pytest.warns(UserWarning, match="100% of the backward solves of core failed .* MAX_STEPS"):
        assert watch.step()["core/backward_failed"] == 1


def test_it_names_the_most_frequent_outcome():
    layer = DEQ(Scaled(), max_steps=30)
    watch = Watch(layer, every=1)
    layer(torch.tensor([[2.0], [3.0], [0.86]]))
    with pytest.warns(UserWarning, match="100% of the solves .* most of them GROWING: The norm of the state runs away"):
        assert watch.step()["GROWING"] == pytest.approx(2 / 3)


def test_a_warm_up_is_not_warned_of():
    layer = DEQ(tdeq.cells.Affine(4), adjoint=Unrolled(2))
    watch = Watch(layer, every=1)
    layer(torch.randn(3, 4)).sum().backward()
    report = watch.step()
    assert report["MAX_STEPS"] == 1 and report["steps"] == 2


@pytest.mark.parametrize("by_name", [False, True])
def test_radius(by_name):
    layer = DEQ(tdeq.cells.Affine(6))
    watch = Watch(layer, every=2, radius=True)
    x, later = torch.randn(5, 6), torch.randn(5, 6)
    with torch.no_grad():
        z = layer(x)
    assert not layer._forward_hooks, "the first forward pass has measured"
    layer(x=later) if by_name else layer(later)
    report = [watch.step(), watch.step()][1]
    assert report["radius"] == tdeq.spectral_radius(layer, z, x).max().item()
    layer.eval()
    layer(later)
    layer.train()
    z = layer(x=x) if by_name else layer(x)
    layer(later)
    again = [watch.step(), watch.step()][1]
    assert again["radius"] == tdeq.spectral_radius(layer, z, x).max().item()
    assert len(layer._forward_hooks) == 1 and "radius" not in [watch.step(), watch.step()][1]


def test_radius_counts_what_the_mask_counts():
    layer = DEQ(Scaled())
    watch = Watch(layer, every=1, radius=True, limit=None)
    x, mask = torch.tensor([[0.3, 5.0]]), torch.tensor([[True, False]])
    layer(x, None, mask)
    assert watch.step()["radius"] == pytest.approx(0.3)
    layer(x, mask=mask)
    assert watch.step()["radius"] == pytest.approx(0.3)


def test_a_model_that_is_watched_can_be_copied():
    layer = DEQ(tdeq.cells.Affine(6))
    watch = Watch(layer, every=1, radius=True)
    twin, x = copy.deepcopy(layer), torch.randn(2, 6)
    assert torch.equal(twin(x), layer(x))
    assert watch.step()["radius"] > 0


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


@pytest.mark.slow
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    logged = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net()

        def training_step(self, batch, index):
            return self.model["last"](self.model["core"](self.model["first"](batch))).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Logs(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.append({key: value.item() for key, value in trainer.logged_metrics.items()})

    quiet = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)
    module = Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[Logs()], **quiet
        )
        watch = Watch(module, every=2, radius=True)
        assert watch.attach(trainer) is watch
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 3), batch_size=4))
    assert watch.steps == 8 and len(logged) == 2
    for metrics in logged:
        assert (
            metrics["model.core/CONVERGED"] == 1 and 1 < metrics["model.core/steps"] <= metrics["model.core/steps_max"]
        )
        assert 0 < metrics["model.core/radius"] < 1 and metrics["model.core/backward_steps"] > 1


@pytest.mark.slow
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()

        def forward(self, x, labels):
            y = self.model["last"](self.model["core"](self.model["first"](x)))
            return {"loss": (y[:, 0] - labels).square().mean(), "logits": y}

    data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(16)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        arguments = transformers.TrainingArguments(
            *(str(tmp_path),), use_cpu=True, max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True
        )
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data)
        watch = Watch(trainer.model, every=2, radius=True).attach(trainer)
        trainer.train()
    assert watch.steps == 4
    logged = [entry for entry in trainer.state.log_history if "model.core/steps" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        assert entry["model.core/CONVERGED"] == 1 and 0 < entry["model.core/radius"] < 1
        assert entry["model.core/backward_steps"] > 1
