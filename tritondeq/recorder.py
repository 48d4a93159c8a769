"""CUDA graphs of work that the host would launch: see graphs.py."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2

Work = Callable[[], None]


class Recorder:
    """Turns work into a replay of it, on one CUDA device."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.repeats = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")

    def repeat(self, going: Tensor, body: Work) -> None:
        """As part of work: `body`, which renews `going`, a bool scalar, for as long as that is true."""
        if not torch.cuda.is_current_stream_capturing():
            body()  # to warm up
            return
        graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_while_node(going)
        try:
            body()
            graph.set_conditional_handle_for_current_node(going)
        finally:
            graph.end_capture_to_conditional_node()

    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):  # lazy initialisations can't be captured
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                work()
            graph.replay()  # what it writes has been garbage so far
        return graph.replay


def can_record(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
