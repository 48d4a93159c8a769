"""Marks for tests of what not every installation has."""

import pytest

from tritondeq.kernels import dispatch

NO_KERNELS = (dispatch.too_old() or "") if dispatch.has_triton() else "triton is not installed"
kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
