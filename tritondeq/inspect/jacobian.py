"""The Jacobian J = df/dz of a cell at its fixed point: a penalty that keeps it small, and its spectral radius."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cells import Cell
from ..checks import integer
from ..deq import DEQ
from ..gradient import Point as Evaluation
from ..layout import Layout, describe
from ..problem import Problem

SQUARINGS = 20  # ||H^k||^(1/k) with k = 2^20 exceeds the radius of a Jordan block of two by 1e-5 of it


def jacobian_penalty(
    f: Callable[..., Any], z: Any, *args: Any, probes: int = 1, batch_dims: int | None = None, mask: Any = None
) -> Tensor:
    """Estimates ||J||_F^2 / N per sample without bias: add `weight * penalty.mean()` to the loss (Bai et al. 2021).

    It is Hutchinson's estimate ||v' J||^2 / N with independent signs v. N counts the elements of a sample, so this is
    the mean of J's squared singular values. It costs an evaluation of f, and for each probe a vector-Jacobian product
    that is differentiated once more: f must be twice differentiable (attention takes its form that is).

    The gradient reaches all that f uses. If z carries one, as a layer's output does, it goes through z too: the exact
    gradient of the equilibrium's penalty, without a further solve where the loss uses that z. The paper does not: pass
    z.detach().

    Args:
        f: A `DEQ`, or any cell or function that returns a state like z. `FixedDropout` in train() draws a mask for it.
        z: The layer's output, or any state.
        *args: Of a DEQ its input x; of a cell or function what it takes after z, such as `cell.inject(x)`.
        probes: Random vectors per sample; the estimate is their mean.
        batch_dims: Leading dims of z that index samples, which must not depend on each other. None: as the cell has it.
        mask: bool, True where an element counts, as in `fixed_point`; J is that of those. None: as the cell has it.

    Returns:
        A tensor of the batch shape, in float32 (float64 in float64).

    Raises:
        TypeError, ValueError: An argument or what f returned does not fit; the message names it.
        RuntimeError: In the backward pass, where f can be differentiated only once.
    """
    integer("probes", probes)
    at = point(f, z, args, batch_dims, mask)
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        flat = at.z.view_as(at.z) if graph and at.z.requires_grad else at.z.detach().requires_grad_()
        out = at.layout.pack(at.f(at.layout.unpack(flat), *at.args))
    total = at.z.new_zeros(at.layout.batch)
    for _ in range(probes if out.requires_grad else 0):
        v = at.counted(torch.empty_like(out, requires_grad=False).bernoulli_(0.5).mul_(2).sub_(1))
        v.requires_grad_(graph)  # or an f marked once_differentiable would give no gradient in silence
        (product,) = torch.autograd.grad(out, flat, v, retain_graph=True, create_graph=graph, materialize_grads=True)
        total = total + at.counted(product).square().sum(dim=1)
    count = max(at.layout.width, 1) if at.mask is None else at.mask.sum(dim=1).clamp(min=1)
    return at.layout.per_sample(total / (probes * count))


@torch.no_grad()
def spectral_radius(
    f: Callable[..., Any], z: Any, *args: Any, products: int = 20, batch_dims: int | None = None, mask: Any = None
) -> Tensor:
    """Returns max |eigenvalue of J| per sample: below 1, plain iteration converges from nearby, as does its adjoint.

    The method is Arnoldi's (1951). It is exact to 1e-5 where a sample has no more elements than `products`, and else
    mostly low: 256 x 256 random numbers, whose eigenvalues crowd at the radius, by up to 11 % with 20 products and 7 %
    with 30. A J far from a normal matrix may come out high, as so many steps of an iteration would feel it. Leaves no
    graph, draws nothing from torch's generators, and needs memory for `products` + 1 states.

    Args:
        f: As in `jacobian_penalty`; so are z, *args, batch_dims and mask, and what is raised.
        z: The state.
        *args: What f takes beside.
        products: Vector-Jacobian products at most.
        batch_dims: Leading dims of z that index samples.
        mask: bool, True where an element counts.

    Returns:
        A tensor of the batch shape, in float32 (float64 in float64); NaN where J is not finite.
    """
    integer("products", products)
    at = point(f, z, args, batch_dims, mask)
    return at.layout.per_sample(radius(hessenberg(at, products))).to(at.layout.dtype)


@dataclass(frozen=True)
class Point:
    """f at z [B, N], and which elements count (None: all)."""

    f: Callable[..., Any]
    args: tuple
    layout: Layout
    z: Tensor
    mask: Tensor | None

    def counted(self, flat: Tensor) -> Tensor:
        """Returns a copy that is zero where an element does not count."""
        return flat if self.mask is None else torch.where(self.mask, flat, 0.0)


def point(f: Any, z: Any, args: tuple, batch_dims: int | None, mask: Any) -> Point:
    """Checks the arguments of this file's functions, and returns f at z."""
    if isinstance(f, DEQ):
        if len(args) != 1:
            raise TypeError(f"args must be the layer's input x and nothing else, got {len(args)} arguments after z")
        f, (x,) = f.cell, args
        if isinstance(f, Cell):
            x, mask = (x, mask) if mask is None else f.padded(x, mask)
            x = f.inject(x)
        args = (x,)
    if not callable(f):
        raise TypeError(f"f must be a DEQ, a cell or a function, got {describe(f)}")
    if mask is None and isinstance(f, Cell):
        mask = f.counts(*args)
    layout = Layout(z, getattr(f, "batch_dims", 1) if batch_dims is None else batch_dims, "z")
    return Point(f, args, layout, layout.pack(z, "z"), layout.mask(mask))


def hessenberg(at: Point, products: int) -> Tensor:
    """Returns J' of each sample in an orthonormal basis of its Krylov space: [B, min(products, N), same] in float64.

    The space is that of one vector, the same for every sample. Where it is exhausted sooner, the rest is 0.
    """
    evaluation = Evaluation(Problem(at.f, at.args, at.layout, inputs=()), at.z)
    batch, width = at.z.shape
    k = min(products, width)
    generator = torch.Generator(at.z.device).manual_seed(0)
    v = torch.randn(width, generator=generator, device=at.z.device, dtype=at.z.dtype)
    basis = at.z.new_zeros(batch, k + 1, width)
    h = at.z.new_zeros(batch, k + 1, k)
    with torch.autocast(at.z.device.type, enabled=False):
        basis[:, 0] = torch.nn.functional.normalize(at.counted(v.expand(batch, -1)), dim=1)
        for j in range(k):
            w = at.counted(evaluation.vjp(basis[:, j]))
            before = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            known = basis[:, : j + 1]
            for _ in range(2):  # once is not enough for orthogonality in floating point
                along = torch.einsum("bjn,bn->bj", known, w)
                w = w - torch.einsum("bj,bjn->bn", along, known)
                h[:, : j + 1, j] += along
            size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            new = ~(size <= 100 * torch.finfo(w.dtype).eps * before)
            h[:, j + 1, j] = torch.where(new, size, 0.0)[:, 0]
            basis[:, j + 1] = torch.where(new, w / size, 0.0)
    return h[:, :k].double()


def radius(h: Tensor) -> Tensor:
    """Returns the spectral radius of each [k, k] by Gelfand's formula, lim ||h^m||^(1/m), which needs no sync."""
    log = h.new_zeros(h.shape[0])
    for _ in range(SQUARINGS):
        size = torch.linalg.matrix_norm(h)
        h = h / size.clamp(min=torch.finfo(h.dtype).tiny)[:, None, None]
        h, log = h @ h, 2 * (log + size.log())
    return ((log + torch.linalg.matrix_norm(h).log()) / 2**SQUARINGS).exp()
