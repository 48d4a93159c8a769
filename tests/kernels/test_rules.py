"""The rules of one sample, written again in plain Python, against those of the torch loop and of the kernels."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tritondeq.kernels import rules
from tritondeq.kernels import tl_common as tc
from tritondeq.kernels.rules import CONVERGED, GROWING, MAX_STEPS, NONFINITE, PLATEAU, WINDOW, Rules

TOL = 1e-12
KINDS = [(1.0, 0.0), (1.0, 0.3), (0.0, 1.0), (0.5, 0.01)]  # relative, scale
nonfinite = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, about NaN


def plain(norms, relative, scale, tol=TOL, floor=rules.FLOOR_FP64):
    """Returns (residuals, best, steps, status) of one sample whose evaluations have these norms (r, s), as floats."""
    first, peak = norms[0][1], norms[0][0]
    share = 0.01 * first if math.isfinite(first) else 0.0
    best, marks, lows, residuals, status = math.inf, [], [], [], MAX_STEPS
    for k, (r, s) in enumerate(norms, 1):
        rel = r / max(relative * max(s, share), scale, 1e-30) if s < math.inf else math.nan
        residuals.append(rel)
        best = rel if rel < best else best
        span = k / 12
        stuck = False
        if span.is_integer():
            peak = r if r > peak else peak
            stuck = not rel < math.inf
        if span >= 1 and math.log2(span).is_integer():
            if marks:
                stuck |= 0.999 * marks[-1] < best <= floor and s >= 0.999 * min(lows)
            marks.append(best)
            lows.append(s)
        if best <= tol or stuck:
            status = PLATEAU if stuck else CONVERGED
            break
    if best <= tol:
        status = CONVERGED
    if s > 8 * first and r > 0.5 * peak:
        status = GROWING
    return residuals, best, k, status if rel < math.inf else NONFINITE


def courses(count, length, dtype):
    """Returns norms r, s [length, count] of samples that fall, stand still, decay, grow or overflow."""
    k = torch.arange(length, dtype=torch.float64)[:, None]
    rate = 1 - 10 ** (-4 * torch.rand(count, dtype=torch.float64))
    still = torch.randint(1, length, (count,))
    s = torch.stack([torch.ones(count), rate, 1 / rate])[torch.randint(0, 3, (count,)), torch.arange(count)] ** k
    r = s * 10 ** (-12 * torch.rand(count, dtype=torch.float64)) * rate ** torch.minimum(k, still)
    r = r * (1 + torch.rand(count) * torch.rand(length, count) * (torch.rand(count) < 0.5))
    r, s = r.to(dtype), s.to(dtype)
    for i, bad in enumerate([(math.nan, math.nan), (math.inf, 1.0), (0.0, math.inf), (1.0, 0.0), (0.0, 0.0)]):
        at = (0, 5, 13, 30)[i % 4]
        r[at, i], s[at, i] = bad
        r[at:, i + 8], s[at:, i + 8] = bad
    return r, s


def drive(r, s, relative, scale):
    """Returns the rules after all evaluations, and the residuals of each, [length, B]; frozen samples stay."""
    held, residuals = Rules(r.shape[1], r.dtype, r.device, TOL, relative, scale), []
    for k in range(1, len(r) + 1):
        going = held.active
        shown = (r[k - 1], s[k - 1])
        if k > 1:
            shown = tuple(torch.where(going, new, old) for new, old in zip(shown, (held.r, held.s), strict=True))
        held.update(k, *shown)
        residuals.append(held.rel)
    return held, torch.stack(residuals)


@pytest.mark.parametrize("relative, scale", KINDS)
def test_the_torch_rules_are_the_plain_ones(relative, scale):
    r, s = courses(400, 120, torch.float64)
    held, residuals = drive(r, s, relative, scale)
    seen = set()
    for b in range(r.shape[1]):
        rel, best, steps, status = plain(list(zip(r[:, b].tolist(), s[:, b].tolist(), strict=True)), relative, scale)
        np.testing.assert_allclose(residuals[:steps, b].numpy(), rel, rtol=1e-14)
        assert held.steps[b] == steps and held.status()[b] == status and held.best[b].item() == pytest.approx(best)
        seen.add((status, steps if status == PLATEAU else 0))
    assert {status for status, _ in seen} == {CONVERGED, PLATEAU, MAX_STEPS, GROWING, NONFINITE}
    assert {steps for _, steps in seen} == {0, 24, 48, 96}


@triton.jit
def _course(r_ptr, s_ptr, begin_ptr, out_ptr, length: tl.constexpr, relative, scale, tol, B: tl.constexpr):
    """Evaluates each lane from its turn on, as tiles do whose rows are replaced; leaves its state, steps and status."""
    lanes = tl.arange(0, B)
    begin = tl.load(begin_ptr + lanes)
    state = tc.rules_start(tol, scale, B)
    k = begin * 0
    r = lanes * 0.0
    s = r
    go = begin >= 0
    for turn in range(2 * length):
        live = go & (turn >= begin)
        k += live.to(tl.int32)
        offs = tl.where(live, k - 1, 0) * B + lanes
        r = tl.where(live, tl.load(r_ptr + offs), r)
        s = tl.where(live, tl.load(s_ptr + offs), s)
        rel, improved, state = tc.rules_update(state, k, r, s, relative, live, live)
        go = go & ~(live & (~(state[0] > state[1]) | (k >= length)))
    for i in tl.static_range(7):
        tl.store(out_ptr + i * B + lanes, state[i])
    tl.store(out_ptr + 7 * B + lanes, k.to(tl.float32))
    tl.store(out_ptr + 8 * B + lanes, tc.rules_status(state, r, s, relative, tol).to(tl.float32))


@nonfinite
@pytest.mark.parametrize("relative, scale", KINDS)
def test_the_kernels_rules_are_the_torch_ones(relative, scale, device):
    """To the bit, and whatever the evaluation of the neighbours is."""
    lanes, length = 256, 100
    r, s = (norms.to(device) for norms in courses(lanes, length, torch.float32))
    begin, out = torch.randint(0, 40, (lanes,), dtype=torch.int32, device=device), torch.empty(9, lanes, device=device)
    _course[(1,)](r, s, begin, out, length, relative, max(scale, rules.EPS), TOL, B=lanes)
    held, _ = drive(r, s, relative, scale)
    assert torch.equal(out[7].int(), held.steps) and torch.equal(out[8].int(), held.status())
    for i, right in ((0, held.best), (2, held.base), (3, held.first)):  # the others of a frozen sample mean nothing
        torch.testing.assert_close(out[i], right, rtol=0, atol=0, equal_nan=True)
    stopped = {int(k) for k, status in zip(out[7], out[8], strict=True) if status == PLATEAU}
    assert stopped == {24, 48, 96}


@pytest.mark.parametrize("last, stops", [(1, 24), (12, 24), (13, 48), (24, 48), (25, 96), (48, 96), (49, 192)])
def test_a_sample_is_given_as_long_again_as_it_took(last, stops):
    """The residual falls for the last time at evaluation `last`, and by less than PROGRESS asks for after it."""
    held = Rules(1, torch.float64, torch.device("cpu"), TOL)
    for k in range(1, 200):
        r = 1e-9 * (2 - min(k, last) / 200) * (1 - 1e-6 * k)
        held.tol, _ = 0.0, held.bar.masked_fill_(held.bar == TOL, 0.0)
        held.update(k, torch.tensor([r], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert held.steps.item() == stops and held.status().item() == PLATEAU


@pytest.mark.parametrize("status, r, s", [(GROWING, 1.0, 1.01), (PLATEAU, 1.0, 1.0), (MAX_STEPS, 0.99, 0.99)])
def test_what_stands_still_and_what_does_not(status, r, s):
    """Only where neither the residual nor the norm falls; a norm that grows takes the residual down."""
    held = Rules(1, torch.float64, torch.device("cpu"), 1e-12)
    for k in range(400):
        held.update(k + 1, *(torch.tensor([x], dtype=torch.float64) for x in (1e-9 * r**k, s**k)))
        if k < 300 and status == MAX_STEPS:
            assert held.active.all()
    assert held.status().item() in (status, CONVERGED if status == MAX_STEPS else status)
    assert held.steps.item() == (2 * WINDOW if status == PLATEAU else held.steps.item())
