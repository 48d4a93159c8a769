"""What tests of the solve with a grid barrier share: launch parameters, rows of many depths, both directions."""

import torch
from test_affine import problem

from tritondeq.kernels import affine_grid as op
from tritondeq.kernels import launch


def shape(block_n=None, groups=2, block_k=16):
    """Launch parameters like those that we ship; None is one program for all features."""

    def parameters(*, batch, features, terms, shared, processors):
        blocks = {"BLOCK_M": 16, "BLOCK_N": block_n or launch.block(features), "BLOCK_K": block_k, "GROUPS": groups}
        return blocks | {"CHUNKS": -(-features // (groups * block_k)), "num_warps": groups, "num_stages": 1}

    return parameters


def uneven(batch, features, device):
    """Rows that need from few to many steps, and the pre-activation of such an adjoint."""
    w, u = problem(batch, features, device, norm=0.6)
    scales = torch.logspace(-2, 1, batch, device=device)[:, None]
    return w, u * scales, torch.randn_like(u) * scales.sqrt()


def outcomes(w, u, pre, **settings):
    return *op.affine_grid_solve(w, u, **settings), *op.affine_grid_adjoint(w, pre, u, **settings)
