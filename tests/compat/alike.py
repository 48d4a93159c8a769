"""When two results are the same, and options by which a solve ends at its solution."""

TIGHT = {"f_max_iter": 120, "f_tol": 1e-13, "b_max_iter": 120, "b_tol": 1e-13}


def agree(mine, other, rtol):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()
