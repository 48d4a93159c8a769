"""What the loop does around the steps: how it asks for the end, and the error where there is no room."""

import pytest
import torch
from replays import HERE, THERE, Cuda

import tritondeq as tdeq
from tritondeq import Anderson, Picard, loop
from tritondeq.kernels.steps import anderson


class Stream:
    """Stands in for torch.cuda: copies arrive when they are waited for, and what was waited for is counted."""

    def __init__(self, monkeypatch, capturing=False):
        self.waits = 0
        self.pending = []
        self.recorded = set()
        stream = self
        Cuda(monkeypatch, THERE if capturing else HERE)

        class Flag(torch.Tensor):
            def copy_(self, source, non_blocking=False):
                assert non_blocking
                stream.pending.append((self, source.clone()))
                return self

        class Event:
            def record(self, where=None):
                stream.recorded.add(where or torch.cuda.current_stream())
                self.mine = list(stream.pending)

            def synchronize(self):
                stream.waits += 1
                for flag, source in self.mine:
                    torch.Tensor.copy_(flag, source)

        def ones(*args, pin_memory=False, **options):
            assert pin_memory and not capturing
            return torch.full((), 1, dtype=options["dtype"]).as_subclass(Flag)

        monkeypatch.setattr(loop.torch, "ones", ones)
        monkeypatch.setattr(torch.cuda, "Event", Event)


def test_on_a_gpu_the_host_waits_for_what_is_long_done(monkeypatch):
    """It learns after each step how many samples went on after the one before, on the stream where that is computed."""
    stream = Stream(monkeypatch)
    look, asked, ended = loop.Look(THERE, None), [], None
    for k in range(1, 40):

        def active(k=k):
            asked.append(k)
            return torch.tensor(max(0, 10 - k), dtype=torch.int32)  # none is left from the tenth on

        if look(active) == 0:
            ended = k
            break
    assert ended == 11 and asked == list(range(1, 12)) and stream.waits == 10
    assert stream.recorded == {"stream of cuda:1"}


def test_under_capture_it_does_not_ask(monkeypatch):
    Stream(monkeypatch, capturing=True)
    look = loop.Look(THERE, None)
    assert [look(lambda: pytest.fail("a number was asked for")) for _ in range(20)] == [None] * 20


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_error_for_no_room_names_what_to_do(name, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    z0 = torch.zeros(2, 1 << 18)
    with monkeypatch.context() as patch, tdeq.backend(name):
        patch.setattr(Anderson, "init", full)
        patch.setattr(anderson.AndersonSteps, "__init__", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"Anderson\(memory=4.*of 2 MiB.*lower its memory.*20.00 GiB"):
            tdeq.fixed_point(lambda z: 0.5 * z + 1, z0, solver=Anderson())
    assert tdeq.fixed_point(lambda z: 0.5 * z + 1, z0, solver=Picard()).converged.all()
    assert tdeq.fixed_point(lambda z: 0.5 * z + 1, z0, solver=Anderson()).converged.all()


def test_rings_are_handed_on_with_the_oldest_first():
    """Evaluation k > 1 wrote k into slot (k - 2) % 4 until the sample stopped: empty slots come first, then by age."""
    steps = torch.tensor([1, 2, 3, 5, 6, 9, 12])
    ring = torch.zeros(len(steps), 4, 1)
    for b, stop in enumerate(steps.tolist()):
        for k in range(2, stop):
            ring[b, (k - 2) % 4] = k
    ordered = loop._oldest_first(ring, steps.int()).squeeze(2)
    for row, stop in zip(ordered.tolist(), steps.tolist(), strict=True):
        written = list(range(2, stop))[-4:]
        assert row == [0] * (4 - len(written)) + written
