"""Random solves, none of them silently wrong; and the instrument that shows so can fail."""

import itertools
import warnings
from dataclasses import replace

import fuzz
import pytest
import torch
from fuzz import BAD, Case
from fuzz_judge import BROKEN, REPORTED, RIGHT, UNNAMED, WRONG

import tritondeq as tdeq

SEED, CASES, BLOCKS = 20, 500, 10
PLAIN = ("Affine", "MLP", "Transformer", "module", "weight_norm", "closure", "nested state")


@pytest.fixture(autouse=True)
def one_thread():
    """States of a few elements are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_none_is_silently_wrong(block):
    bad = []
    for index in range(block, CASES, BLOCKS):
        case = Case(SEED, index)
        kind, verdict = case.run()
        if verdict.name in BAD:
            bad.append(f"{verdict.name}: {kind}: {verdict.detail}\n    {case}")
    assert not bad, "\n".join(["replay with", *bad])


def cases(count):
    """The first cases of plain kinds."""
    every = (Case(1, index) for index in itertools.count())
    return list(itertools.islice((case for case in every if case.drawn()[1] in PLAIN), count))


def names(plant, monkeypatch, count=40):
    """The verdicts, beside those without the plant, where every solve of the library goes through `plant`."""
    before = [case.run()[1].name for case in cases(count)]
    solve, point = tdeq.DEQ.solve, tdeq.fixed_point
    monkeypatch.setattr(tdeq.DEQ, "solve", lambda layer, *args: plant(solve, layer, *args))
    monkeypatch.setattr(tdeq, "fixed_point", lambda *args, **options: plant(point, *args, **options))
    return [(was, case.run()[1].name) for was, case in zip(before, cases(count), strict=True)]


def changed(solution, change):
    """The solution with another value, or one that has another gradient."""
    return replace(solution, value=torch.utils._pytree.tree_map(change, solution.value))


def scaled(solve, *args, **options):
    """A gradient that is one percent too long."""
    return changed(solve(*args, **options), lambda z: 1.01 * z - (0.01 * z).detach())


def one_step(solve, *args, **options):
    """The gradient of one step, whatever was asked."""
    if "adjoint" in options:
        return solve(*args, **options | {"adjoint": tdeq.OneStep()})
    layer, asked = args[0], args[0].adjoint
    layer.adjoint = tdeq.OneStep()
    try:
        return solve(*args)
    finally:
        layer.adjoint = asked


def early(solve, *args, **options):
    """CONVERGED, and the state is off by one part in a hundred."""
    solution = changed(solve(*args, **options), lambda z: z + 0.01 * torch.ones_like(z))
    return replace(solution, status=torch.zeros_like(solution.status), residual=torch.zeros_like(solution.residual))


def lost(solve, *args, **options):
    """No gradient."""
    return changed(solve(*args, **options), torch.Tensor.detach)


def mates(solve, *args, **options):
    """One sample has another one's value."""
    return changed(solve(*args, **options), lambda z: z.flip(0) if len(z) > 1 else z)


@pytest.mark.parametrize("plant,least", [(scaled, 0.3), (one_step, 0.3), (early, 0.6), (lost, 0.6), (mates, 0.3)])
def test_a_plant_is_seen(plant, least, monkeypatch):
    pairs = names(plant, monkeypatch)
    was_right = [now for was, now in pairs if was == RIGHT]
    assert len(was_right) > 20
    assert was_right.count(WRONG) >= least * len(was_right), pairs


def test_what_the_library_admits_is_reported(monkeypatch):
    def warned(solve, *args, **options):
        warnings.warn("samples of this batch depend on one another", stacklevel=2)
        return early(solve, *args, **options)

    pairs = names(warned, monkeypatch, 20)
    assert WRONG not in [now for _, now in pairs] and REPORTED in [now for _, now in pairs]


def test_an_error_where_an_answer_is_due_is_bad(monkeypatch):
    def refused(solve, *args, **options):
        raise RuntimeError("the cell is refused")

    assert {now for _, now in names(refused, monkeypatch, 5)} == {BROKEN} <= set(BAD)


def test_an_error_that_is_not_the_library_s_is_counted_apart(monkeypatch):
    index = next(i for i in range(1000) if Case(0, i).drawn()[1] == "randomness")
    monkeypatch.setattr(tdeq, "fixed_point", lambda *_, **__: [][0])
    assert Case(0, index).run()[1].name == UNNAMED


def test_a_case_is_the_same_each_time():
    (case,) = cases(1)
    assert case.run() == case.run() and "--seed 1 --only" in str(case)


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(
        Case, "run", lambda case: ("Affine", fuzz.Verdict(WRONG if case.index == 2 else RIGHT, "planted"))
    )
    assert fuzz.main(["--solves", "2"]) == 0
    assert fuzz.main(["--solves", "3", "--seed", "7"]) == 1
    out = capsys.readouterr().out
    assert "planted\n    python -m tests.fuzz --seed 7 --only 2\n" in out
    assert out.splitlines()[-1].split() == ["all", "2", "0", "0", "0", "1"]

    def stop(case):
        raise KeyboardInterrupt

    monkeypatch.setattr(Case, "run", stop)
    assert fuzz.main(["--solves", "3"]) == 130
    assert capsys.readouterr().out == "interrupted after 0 of 3 cases\n"
