"""The bf16 terms of matrices, which every kernel that holds a cell multiplies by."""

import pytest
import torch

from tritondeq.kernels.rows.terms import BLOCK, bf16_terms, bf16_terms_ref

SIZES = [(1, 1), (31, 31), (16, 33), (BLOCK // 8, 8), (1, BLOCK + 1)]


@pytest.mark.parametrize("terms, error", [(1, 2**-8), (2, 2**-16), (3, 2**-23)])
def test_terms_add_up_to_the_matrix(terms, error, device):
    matrices = tuple(torch.randn(size, device=device) for size in SIZES)
    for w, parts in zip(matrices, bf16_terms(matrices, terms), strict=True):
        assert parts.dtype == torch.bfloat16 and parts.shape == (terms, *w.shape)
        assert ((parts.double().sum(0) - w).abs() <= error * w.abs()).all()


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_they_are_those_of_torch_to_the_bit(terms, device):
    """Of any strides and values, into wider memory that was used before."""
    w = torch.randn(40, 40, device=device)
    values = torch.tensor([0.0, -0.0, 1e-30, 3e38, float("inf"), float("nan"), 1 + 2**-9], device=device).repeat(3, 1)
    matrices = (w, w.T, w[3:20, 1::2], w[:1].expand(5, 40), values)
    out = [tuple(torch.full((terms, 64, 48), float("nan"), dtype=torch.bfloat16, device=device) for _ in matrices)]
    out.append(tuple(map(torch.clone, out[0])))
    for given in ((None, None), out):
        expected, actual = bf16_terms_ref(matrices, terms, given[0]), bf16_terms(matrices, terms, given[1])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(a.isnan(), b.isnan())
