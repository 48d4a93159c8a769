"""How the solves of a model go while it trains."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks import boolean, integer, number
from ..deq import DEQ
from ..layout import describe
from ..solution import Route, Status
from .jacobian import spectral_radius


class Watch:
    """Gathers steps, residuals and outcomes of every `DEQ` of a model while it trains.

    Call `step` after each training step, or let a trainer do it: `Watch(model).attach(trainer)`, of Lightning or of
    transformers. Of a layer that is called several times in a step, the last call counts.

    Args:
        model: What holds the layers, or is one.
        every: Training steps from one report to the next. No other step waits for the device.
        radius: Report the largest spectral radius too, as of the layer's first forward pass in train() after the report
            before. Costs 20 vector-Jacobian products and the memory of 21 states, then.
        limit: Warn, once, where a larger share of the samples of a report failed: MAX_STEPS, GROWING or NONFINITE,
            forward or backward. None never warns, as is right where max_steps is drawn at random.

    Raises:
        TypeError: The model is no module, or an option is of the wrong kind.
        ValueError: The model holds no `DEQ`, or an option is out of range.
    """

    def __init__(self, model: nn.Module, *, every: int = 100, radius: bool = False, limit: float | None = 0.05):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        integer("every", every)
        boolean("radius", radius)
        if limit is not None:
            number("limit", limit, 0, closed=True)
        self._layers = [_Layer(name, m, radius, limit) for name, m in model.named_modules() if isinstance(m, DEQ)]
        if not self._layers:
            raise ValueError(f"model must hold a DEQ, got {type(model).__name__} without one")
        self.every, self.steps = every, 0

    def step(self) -> dict[str, float] | None:
        """Takes note of a training step; every `every` steps, returns what happened since the last report.

        Keys are the layer's name in the model, a slash (neither, where the model is the layer), and:
            steps, steps_max: evaluations per sample, their mean and maximum;
            residual, radius: the largest;
            CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE: share of samples;
            backward_steps, backward_failed: mean and share of those that failed, where the backward pass solves.

        A layer that was not called since has no keys.
        """
        for layer in self._layers:
            layer.note()
        self.steps += 1
        if self.steps % self.every:
            return None
        report: dict[str, float] = {}
        for layer in self._layers:
            report |= layer.report()
        return report

    def attach(self, trainer: Any) -> "Watch":
        """Lets a Trainer of Lightning or of transformers call `step` and log its reports. Returns itself.

        A step is what the trainer calls one: a batch for Lightning, an optimizer step for transformers.

        Raises:
            TypeError: It is neither.
        """
        packages = {base.__module__.partition(".")[0] for base in type(trainer).__mro__}

        def on_step_end(callback: Any, arguments: Any, state: Any, control: Any, **_: Any) -> Any:
            if report := self.step():
                due, trainer.control = control.should_log, control
                trainer.log(report)  # lowers should_log, as after the trainer's log of this step
                trainer.control.should_log = due
                return trainer.control

        def on_train_batch_end(callback: Any, trainer: Any, module: Any, *_: Any) -> None:
            module.log_dict(self.step() or {})

        for package, module, base, hook in (
            ("transformers", "transformers", "TrainerCallback", on_step_end),
            ("lightning", "lightning.pytorch", "Callback", on_train_batch_end),
            ("pytorch_lightning", "pytorch_lightning", "Callback", on_train_batch_end),
        ):
            if package in packages:
                parent = getattr(importlib.import_module(module), base)
                callback = type("OnStep", (parent,), {hook.__name__: hook})()
                (trainer.add_callback if package == "transformers" else trainer.callbacks.append)(callback)
                return self
        raise TypeError(f"trainer must be a Trainer of lightning or transformers, got {describe(trainer)}")


class _Layer:
    """What one layer did since the last report."""

    def __init__(self, name: str, layer: DEQ, measures: bool, limit: float | None):
        self.name, self.layer, self.measures, self.limit = name, layer, measures, limit
        self.warned: set[str] = set()
        self.unrolled = False
        self.hook: RemovableHandle | None = None
        self.seen = layer.last
        self.clear()

    def clear(self) -> None:
        self.notes: dict[str, list[tuple[Tensor, Tensor]]] = {"": [], "backward ": []}
        self.radius: Tensor | None = None
        if self.measures and self.hook is None:
            self.hook = self.layer.register_forward_hook(torch.compiler.disable(self.measure), with_kwargs=True)

    def note(self) -> None:
        """Sums the last solves up on their device, by a few small operations, none of which waits."""
        last = self.layer.last
        if last is None or last is self.seen:
            return
        self.seen = last
        self.unrolled = last.route is Route.UNROLLED  # its tolerance does not apply
        for way, solution in (("", last), ("backward ", last.adjoint)):
            if solution is not None and solution.status.numel():
                codes = torch.arange(len(Status), device=solution.status.device)
                counts = (solution.status.flatten() == codes[:, None]).sum(1)
                peaks = torch.stack([solution.steps.max().float(), solution.residual.max().float()])
                self.notes[way].append((torch.cat([counts, solution.steps.sum()[None]]), peaks))

    def measure(self, layer: DEQ, args: tuple, kwargs: dict[str, Any], z: Any) -> None:
        """Is a hook of the layer until its first forward pass in train(), whose radius it takes."""
        if layer is self.layer and layer.training and self.hook is not None:
            self.hook.remove()
            self.hook = None
            given = dict(zip(("x", "z0", "mask"), args, strict=False)) | kwargs
            self.radius = spectral_radius(layer, z, given["x"], mask=given.get("mask")).max()

    def report(self) -> dict[str, float]:
        report: dict[str, float] = {}
        for way, notes in self.notes.items():
            if not notes:
                continue
            *counts, steps = torch.stack([n for n, _ in notes]).sum(0).tolist()
            most, residual = torch.stack([n for _, n in notes]).amax(0).tolist()
            shares = [n / sum(counts) for n in counts]
            failed = shares[Status.MAX_STEPS :]
            if way:
                report |= {"backward_steps": steps / sum(counts), "backward_failed": sum(failed)}
            else:
                report |= {"steps": steps / sum(counts), "steps_max": most, "residual": residual}
                report |= {status.name: share for status, share in zip(Status, shares, strict=True)}
            self.warn(way, failed)
        if self.radius is not None:
            report["radius"] = self.radius.item()
        self.clear()
        return {f"{self.name}/{key}" if self.name else key: value for key, value in report.items()}

    def warn(self, way: str, failed: list[float]) -> None:
        if self.limit is None or self.unrolled or sum(failed) <= self.limit:
            self.warned.discard(way)
        elif way not in self.warned:
            self.warned.add(way)
            status = Status(Status.MAX_STEPS + failed.index(max(failed)))
            warnings.warn(
                f"{sum(failed):.0%} of the {way}solves of {self.name or 'the layer'} failed since the last report, "
                f"most of them {status.name}: {status.sentence} tritondeq.diagnose(layer, x) tries what helps.",
                stacklevel=4,
            )
