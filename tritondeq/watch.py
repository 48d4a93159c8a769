"""How the solves of a model go while it trains."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .checks import integer, number
from .deq import DEQ
from .jacobian import spectral_radius
from .layout import describe
from .solution import Solution, Status


class Watch:
    """Steps, residuals and outcomes of every `DEQ` of a model, gathered while it trains.

    Call `step` after each training step, or let a trainer do it: `Watch(model).attach(trainer)`, of Lightning or of
    transformers. What `last` of each layer says is added up on its device and read once in `every` steps, so that no
    step waits for it. Of a layer that is called several times in a step, the last call counts.

    Args:
        model: What holds the layers, or is one.
        every: Training steps from one report to the next.
        radius: Report the largest spectral radius too, as of the layer's first forward pass in train() after the report
            before. Costs 20 vector-Jacobian products and the memory of 21 states, then, and `FixedDropout` draws a mask
            for it.
        limit: Warn where a larger share of the samples of a report failed: MAX_STEPS, GROWING or NONFINITE, forward or
            backward. Once, until it is below again. None never warns, as is right where max_steps is drawn at random.

    Raises:
        TypeError, ValueError: the model is no module or holds no `DEQ`; an option is of the wrong kind or out of range.
    """

    def __init__(self, model: nn.Module, *, every: int = 100, radius: bool = False, limit: float | None = 0.05):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        integer("every", every)
        if not isinstance(radius, bool):
            raise TypeError(f"radius must be a bool, got {radius!r}")
        if limit is not None:
            number("limit", limit, 0, closed=True)
        self._layers = [_Layer(name, m, limit) for name, m in model.named_modules() if isinstance(m, DEQ)]
        if not self._layers:
            raise ValueError(f"model must hold a DEQ, got {type(model).__name__} without one")
        self.every, self.radius, self.steps = every, radius, 0
        if radius:
            for layer in self._layers:
                layer.measure()

    def step(self) -> dict[str, float] | None:
        """Takes note of a training step; every `every` steps, what came about since the last report.

        Keys are the layer's name in the model, a slash (neither, where the model is the layer), and:
            steps, steps_max: evaluations per sample, their mean and maximum;
            residual: the largest;
            CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE: share of samples;
            backward_steps, backward_failed: mean and share of those that failed, where the backward pass solves;
            radius: the largest spectral radius, where it is asked for.

        A layer that was not called since has no keys. Syncs where it reports.
        """
        for layer in self._layers:
            layer.note()
        self.steps += 1
        if self.steps % self.every:
            return None
        report = {}
        for layer in self._layers:
            report |= layer.report()
            if self.radius:
                layer.measure()
        return report

    def attach(self, trainer: Any) -> "Watch":
        """Lets a Trainer of Lightning or of transformers call `step`, and log what it reports. Returns itself.

        A step is what the trainer calls one: a batch for Lightning, an optimizer step for transformers.

        Raises:
            TypeError: it is neither.
        """
        packages = [base.__module__.partition(".")[0] for base in type(trainer).__mro__]
        if "transformers" in packages:
            trainer.add_callback(_for_transformers(self, trainer))
            return self
        for package, module in {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}.items():
            if package in packages:
                trainer.callbacks.append(_for_lightning(self, importlib.import_module(module).Callback))
                return self
        raise TypeError(f"trainer must be a Trainer of lightning or transformers, got {describe(trainer)}")


def _for_lightning(watch: Watch, base: type) -> Any:
    class WatchCallback(base):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log_dict(watch.step() or {})

    return WatchCallback()


def _for_transformers(watch: Watch, trainer: Any) -> Any:
    from transformers import TrainerCallback

    class WatchCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            report = watch.step()
            if report:
                trainer.log(report)

    return WatchCallback()


class _Layer:
    """What is known of one layer since the last report."""

    def __init__(self, name: str, layer: DEQ, limit: float | None):
        self.name, self.prefix, self.layer, self.limit = name, f"{name}/" if name else "", layer, limit
        self.warned: set[str] = set()
        self.unrolled = False
        self.seen = layer.last
        self.clear()

    def clear(self) -> None:
        self.forward, self.backward, self.radius = _Sums(), _Sums(), None

    def note(self) -> None:
        last = self.layer.last
        if last is None or last is self.seen:
            return
        self.seen = last
        self.unrolled = "unrolled" in last.path  # its tolerance does not apply
        self.forward.add(last)
        if last.adjoint is not None:
            self.backward.add(last.adjoint)

    def measure(self) -> None:
        """At the next forward pass, once."""

        @torch.compiler.disable
        def hook(layer, args, kwargs, z):
            if layer.training:
                handle.remove()
                given = dict(zip(("x", "z0", "mask"), args, strict=False)) | kwargs
                self.radius = spectral_radius(layer, z, given["x"], mask=given.get("mask")).max()

        handle = self.layer.register_forward_hook(hook, with_kwargs=True)

    def report(self) -> dict[str, float]:
        forward, backward = self.forward.read(), self.backward.read()
        said = {}
        if forward is not None:
            said = {"steps": forward.steps, "steps_max": forward.most, "residual": forward.residual}
            said |= {status.name: share for status, share in zip(Status, forward.shares, strict=True)}
            self.warn("", forward)
        if backward is not None:
            said |= {"backward_steps": backward.steps, "backward_failed": sum(backward.shares[Status.MAX_STEPS :])}
            self.warn("backward ", backward)
        if self.radius is not None:
            said["radius"] = self.radius.item()
        self.clear()
        return {self.prefix + key: value for key, value in said.items()}

    def warn(self, way: str, sums: "_Sums") -> None:
        failed = sums.shares[Status.MAX_STEPS :]
        if self.limit is None or self.unrolled or sum(failed) <= self.limit:
            self.warned.discard(way)
        elif way not in self.warned:
            self.warned.add(way)
            status = Status(Status.MAX_STEPS + failed.index(max(failed)))
            warnings.warn(
                f"{sum(failed):.0%} of the {way}solves of {self.name or 'the layer'} failed since the last report, "
                f"most of them {status.name}: {status.sentence} tritondeq.diagnose(layer, x) tells what helps.",
                stacklevel=4,
            )


class _Sums:
    """Solutions, added up on their device."""

    def __init__(self):
        self.counts: Tensor | None = None

    def add(self, solution: Solution) -> None:
        """By a few small operations, none of which waits."""
        status = solution.status.flatten()
        if not status.numel():
            return
        codes = torch.arange(len(Status), device=status.device, dtype=status.dtype)
        counts = torch.cat([(status == codes[:, None]).sum(1), solution.steps.sum()[None]])
        peaks = torch.stack([solution.steps.max().float(), solution.residual.max().float()])
        if self.counts is None:
            self.counts, self.peaks = counts, peaks
        else:
            self.counts, self.peaks = self.counts + counts, torch.maximum(self.peaks, peaks)

    def read(self) -> "_Sums | None":
        """With numbers for the host; None if nothing was added. Syncs."""
        if self.counts is None:
            return None
        *counts, steps = self.counts.tolist()
        self.most, self.residual = self.peaks.tolist()
        self.shares = [n / sum(counts) for n in counts]
        self.steps = steps / sum(counts)
        return self
