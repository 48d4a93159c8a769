"""A backward pass ends without the product J' u where it is no part of the gradient and a cell is one of ours."""

import pytest
import torch

from tritondeq import DEQ, OneStep, Phantom, cells
from tritondeq.bench.measure import AtenOps

WIDTH = 6


class Other(cells.Affine):
    """The same map, of which the library knows nothing but its forward."""

    def forward(self, z, injection):
        return super().forward(z, injection)


def gradients(kind, adjoint, **options):
    """Returns (gradients of the parameters, how many matrix products the backward pass took)."""
    torch.manual_seed(0)
    layer, x = DEQ(kind(WIDTH, **options), adjoint=adjoint, tol=1e-6), torch.randn(5, WIDTH)
    loss = layer(x).square().sum()
    with AtenOps() as seen:
        loss.backward()
    return [p.grad for p in layer.parameters()], seen.counts["mm"]


@pytest.mark.parametrize("options", [{}, {"contraction": 0.9}], ids=repr)
def test_one_step_makes_the_gradients_of_the_weights_alone(options):
    """Those of W and U; what is parametrized is the same cell."""
    known, products = gradients(cells.Affine, OneStep(), **options)
    expected, more = gradients(Other, OneStep(), **options)
    assert more == products + 1
    assert options or products == 2
    assert all(map(torch.equal, known, expected))


def test_a_hook_on_the_cell_still_gets_it():
    layer, seen = DEQ(cells.Affine(WIDTH), adjoint=OneStep()), []
    layer.cell.register_full_backward_hook(lambda cell, products, cotangents: seen.append((products[0], cotangents[0])))
    z = layer(torch.randn(3, WIDTH))
    z.sum().backward()
    ((product, cotangent),) = seen
    torch.testing.assert_close(product, (cotangent * (1 - z.detach() ** 2)) @ layer.cell.weight, rtol=0.02, atol=0.01)


def test_an_adjoint_of_products_still_has_them():
    known, products = gradients(cells.Affine, Phantom(3, 0.5))
    expected, same = gradients(Other, Phantom(3, 0.5))
    assert products == same == 2 + 3
    assert all(map(torch.equal, known, expected))
