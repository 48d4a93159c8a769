"""What a recorder asks of CUDA; a stand-in answers."""

import pytest
import torch

from tritondeq import cuda_graphs


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the graph that is being captured, in order."""
    asked = []

    class Graph:
        def begin_capture_to_while_node(self, going):
            asked.append(("begin", going))

        def set_conditional_handle_for_current_node(self, going):
            asked.append(("again", going))

        def end_capture_to_conditional_node(self):
            asked.append("end")

        @staticmethod
        def get_currently_capturing_graph():
            return Graph()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return asked


def test_a_loop_is_a_while_node(monkeypatch, asked):
    record, going = cuda_graphs.Recorder(torch.device("cuda")), torch.tensor(True)
    assert record.repeats
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    record.repeat(going, lambda: asked.append("body"))
    assert asked == [("begin", going), "body", ("again", going), "end"]


def test_the_node_is_closed_where_the_body_fails(monkeypatch, asked):
    def body():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graphs.Recorder(torch.device("cuda")).repeat(torch.tensor(True), body)
    assert asked[-1] == "end" and len(asked) == 2


def test_outside_of_a_capture_the_body_warms_up_once(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda_graphs.Recorder(torch.device("cuda")).repeat(torch.tensor(True), lambda: asked.append("body"))
    assert asked == ["body"]


def test_older_torch_repeats_by_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    assert not cuda_graphs.Recorder(torch.device("cuda")).repeats
