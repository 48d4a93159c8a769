"""The loop of the whole-solve kernels in torch: their specification, for any device and dtype."""

import torch
from torch import Tensor

from .rules import SAFEGUARD, Rules

RIDGE = 4e-7  # least ridge in fp32: the rounding of a Gram matrix of unit diagonal


def iterate(
    f, z: Tensor, *, tol, max_steps, relative=1.0, scale=0.0, damping=1.0, memory=0, ridge=1e-8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solves z = f(z) for rows z [B, D] as rows/skeleton.py does, with the options and results of `Rows.solve`."""
    rules = Rules(len(z), z.dtype, z.device, tol, relative, scale)
    best, pairs, step, last = z, [], None, None
    for k in range(1, max_steps + 1):
        image = f(z)
        defect = image - z
        improved = rules.update(k, defect.norm(dim=-1), image.norm(dim=-1))
        best = z if improved is None else torch.where(improved[:, None], z, best)
        if k == max_steps or not rules.active.any():
            break
        if memory and k > 1:
            pairs = [*pairs, (step, defect - last)][-memory:]
        step, last = damping * defect, defect
        if pairs:
            dx, dg = (torch.stack(side, -1) for side in zip(*pairs, strict=True))
            gamma = anderson_weights(dg, defect, ridge)
            plain = (rules.rel > SAFEGUARD * rules.best) | ~gamma.isfinite().all(-1)
            gamma = torch.where(plain[:, None], 0.0, gamma)
            step = step - ((dx + damping * dg) @ gamma[..., None])[..., 0]
        step = torch.where(rules.active[:, None], step, 0.0)
        z = z + step
    return best, rules.steps, rules.best, rules.status()


def anderson_weights(dg: Tensor, defect: Tensor, ridge: float) -> Tensor:
    """Returns argmin || defect - dg gamma || for dg [B, D, m], its Gram matrix scaled to a unit diagonal plus ridge."""
    if dg.dtype == torch.float32:
        ridge = max(ridge, RIDGE)
    gram = dg.mT @ dg
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    gram = gram * scale[..., None] * scale[..., None, :]
    gram.diagonal(dim1=-2, dim2=-1).fill_(1 + ridge)
    factor, _ = torch.linalg.cholesky_ex(gram)
    dots = (dg.mT @ defect[..., None]) * scale[..., None]
    return torch.cholesky_solve(dots, factor)[..., 0] * scale
