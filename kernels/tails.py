"""What a cell leaves to the fused steps: how y = f(z) is made of the parts that it hands over."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch
from .formulas import ACTIVATIONS

PARTS = 3  # most tensors that a tail takes


@dataclass(frozen=True)
class Tail:
    """y = f(z), of z and of up to PARTS parts (a, b, c) of its shape.

        s = a + gamma_b b + gamma_c c,    n = act(s),    y = z + mix (n - z)

    Rows are those of the last dim of the state, of D features. The parts may have any floating dtype; sums and norms
    are taken in the dtype of the state.

    Attributes:
        act: "identity"; an activation of `formulas.ACTIVATIONS`, in float32 only; or "rms", the norm
            n = s / sqrt(mean(s^2) + eps) * weight of each row (Zhang and Sennrich 2019).
        gains: gamma of each part but the first, [D], or None where it is 1; none where all are.
        weight: Of "rms", [D].
        eps: Of "rms".
        mix: 1 where y = n.
    """

    act: str = "identity"
    gains: tuple[Tensor | None, ...] = ()
    weight: Tensor | None = None
    eps: float = 0.0
    mix: float = 1.0

    def __post_init__(self):
        if self.act != "rms" and self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {[*ACTIVATIONS, 'rms']}, got {self.act!r}")
        if len(self.gains) >= PARTS:
            raise ValueError(f"a tail of {PARTS} parts has at most {PARTS - 1} gains, got {len(self.gains)}")
        if (self.act == "rms") != (self.weight is not None):
            raise ValueError(f"weight is for act='rms', which needs one, got act={self.act!r}, weight={self.weight}")
        lengths = sorted({len(v) for v in self.vectors})
        if len(lengths) > 1:
            raise ValueError(f"gains and weight must have one length, got {' and '.join(map(str, lengths))}")

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """All gains and the weight, each [D]."""
        return tuple(v for v in (*self.gains, self.weight) if v is not None)

    @property
    def scaled(self) -> tuple[bool, ...]:
        """Whether each part has a gain."""
        scaled = tuple(gain is not None for gain in self.gains)
        return (False, *scaled, *[False] * (PARTS - 1 - len(scaled)))

    @property
    def features(self) -> int:
        """D, or 0 where rows don't matter."""
        return len(self.vectors[0]) if self.vectors else 0

    def fits(self, op: str, z: Tensor) -> bool:
        """Returns whether the steps of `op` take it, for a state z [B, N] whose rows have the `features`."""
        if self.act not in ("identity", "rms") and z.dtype != torch.float32:
            return False
        if not all(v.is_contiguous() and v.is_floating_point() for v in self.vectors):
            return False
        if self.features and z.shape[1] % self.features:
            return False
        shape = {"width": z.shape[1], "itemsize": z.element_size(), "features": self.features}
        return launch.parameters(op, z.device, **shape) is not None

    def __call__(self, z: Tensor, *parts: Tensor) -> Tensor:
        """Returns y in torch, the kernels' reference; z and parts are [..., D]."""
        s = parts[0].to(z.dtype)
        for i, part in enumerate(parts[1:]):
            s = s + (self.gains[i] * part if self.scaled[i + 1] else part)
        if self.act == "rms":
            n = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + self.eps) * self.weight
        else:
            n = ACTIVATIONS[self.act](s)
        return n if self.mix == 1 else z + self.mix * (n - z)


PLAIN = Tail()  # f leaves nothing
