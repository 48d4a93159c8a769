"""What stands in for CUDA graphs where there is no CUDA: a replay is the work itself, done again on the same memory."""

import contextlib

import pytest
import torch

from tritondeq import cuda_graphs

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


class Cuda:
    """Stands in for torch.cuda where two GPUs matter: HERE is the current device, and each has one stream.

    Attributes:
        capturing: The devices whose stream captures a graph.
    """

    def __init__(self, monkeypatch, *capturing):
        self.current, self.capturing = HERE, capturing
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device or self.current}")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current in self.capturing)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before


class Recorder:
    """As tritondeq.cuda_graphs's; `made` counts."""

    made = 0
    repeats = False

    def __init__(self, device):
        pass

    def repeat(self, going, body):
        with pytest.MonkeyPatch.context() as patch:  # autograd would leave the stream on which a body is captured
            patch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("the body of a loop calls autograd"))
            while going:
                body()

    def __call__(self, work):
        Recorder.made += 1
        for _ in range(cuda_graphs.WARM_UP + 1):  # and the first replay; a capture runs nothing
            work()
        return work
