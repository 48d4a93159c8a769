"""What stands in for CUDA graphs where there is no CUDA: a replay is the work itself, done again on the same memory."""

from tritondeq import cuda_graphs


class Recorder:
    """As tritondeq.cuda_graphs's; `made` counts."""

    made = 0
    repeats = False

    def __init__(self, device):
        pass

    def repeat(self, going, body):
        while going:
            body()

    def __call__(self, work):
        Recorder.made += 1
        for _ in range(cuda_graphs.WARM_UP + 1):  # and the first replay; a capture runs nothing
            work()
        return work
