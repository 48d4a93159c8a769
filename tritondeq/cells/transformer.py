"""A transformer block as a cell: attention and a feed-forward net around a normed, injected state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import boolean, integer, number
from ..held import FixedDropout
from ..kernels.tails import Tail
from .base import Cell, one_of
from .norm import plain_norm, sum_and_norm, summed
from .tokens import Past, Store, attention_mask, rotary_angles, rotated, tokens_of, with_padding

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}
_EPS = 1e-6  # of norms
_LAST = 0.3  # scale of the last linears at initialisation
_DECAY = 0.45  # at initialisation


class Injection(NamedTuple):
    """Everything that does not depend on z."""

    u: Tensor  # [B, T, D]
    decay: Tensor | None  # a, [D]
    scales: tuple[Tensor | None, ...]  # gamma of attention and of the feed-forward net, [D]
    angles: tuple[Tensor, Tensor] | None  # cos and sin of the rotary positions, [T, width of a head]
    real: Tensor | None  # [B, T]: no padding
    mask: Tensor | None  # which tokens attend to which, as scaled_dot_product_attention takes it
    is_causal: bool  # whether that is the plain causal mask, and `mask` is None
    past: Past | None  # where to put keys and values


class Transformer(Cell):
    """One transformer block that iterates on its own output, with the input added to its normed state.

    With u = RMS(U x), y = z + u (or a z + b u, see `decay`), RMS the root-mean-square norm over features with a learned
    weight, Attn multi-head attention over tokens, and FFN(h) = W2 act(W1 h), or W2 (silu(W1 h) W3 h) for "swiglu":

        "outer"    h = y + Attn(RMS y),  f = RMS(h + FFN(RMS h))                      pre-norm, with an outer norm
        "damped"   h = RMS(y + Attn y),  f = (1 - damping) z + damping RMS(h + FFN h)              post-norm
        "head"     h = y + g1 Attn(RMS y),  f = h + g2 FFN(RMS h) - (what of y is z)          residual-free

    "outer" is the recurrent block of Implicit LMs (Schoene et al. 2025), "damped" that of TRM and EqR (Jolicoeur-
    Martineau 2025), "head" that of Attractor models (2026): the block with its skip path's z (a z with `decay`)
    subtracted, so that what is left is f = u + g1 Attn(RMS y) + g2 FFN(RMS h), in which the z of the skip path never
    appears and z acts through the two branches alone. g1 and g2 are LayerScale vectors in (0, gamma_max).

    It begins contractive: the last linears of both branches are scaled by 0.3, so that the outer norm of z + u
    dominates, whose Jacobian is about 1/2 (a / (a + b) with `decay`). Training can take that away: watch `last.steps`.
    The state is bounded whatever the weights: by the outer norms, in "head" by branches whose inputs are normed.

    The input is x [B, T, inputs], or (x, mask) with mask [B, T] bool, True for real tokens. Padding is not attended to
    and does not count in the residual; what comes out in its place means nothing. A sample is a sequence. On a GPU the
    last sum of the block, LayerScale, norm, damping and the norms of the residual are one launch.

    Second derivatives through Implicit() need attention that torch can differentiate twice:
    torch.nn.attention.sdpa_kernel(SDPBackend.MATH).

    Args:
        features, inputs: As for `Affine`; z is [B, T, D].
        heads: Heads of attention; must divide `features`.
        kv_heads: Heads of keys and values, each for heads / kv_heads of queries (Ainslie et al. 2023); None is heads.
        hidden: Width of the feed-forward net; None is 4 D, or 8/3 D rounded up to a multiple of 8 for "swiglu".
        wiring: "outer", "damped" or "head".
        activation: "swiglu" (Shazeer 2020), "gelu", "relu" or "silu".
        causal: Whether tokens attend to none that come later; `DEQ.step` needs it.
        rotary: Base of rotary positions (Su et al. 2021), such as 10000.0; None: attention is without positions.
        decay: Whether y = a z + b u, with learned a in (0, 1) and b for each feature: a = exp(-exp(.)) (Parcae, 2026).
        damping: The damping of "damped", in (0, 1]; None is 0.95.
        gamma_max: The largest LayerScale of "head", above 0; None is 0.5.
        dropout: Share of elements of both branches that a `FixedDropout` sets to zero.
        bias: Whether linears have one.
    """

    def __init__(
        self,
        features: int,
        inputs: int | None = None,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        hidden: int | None = None,
        wiring: str = "outer",
        activation: str = "swiglu",
        causal: bool = False,
        rotary: float | None = None,
        decay: bool = False,
        damping: float | None = None,
        gamma_max: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        one_of("wiring", wiring, ("outer", "damped", "head"))
        one_of("activation", activation, _ACTIVATIONS)
        gated = activation == "swiglu"
        inputs = features if inputs is None else inputs
        kv_heads = heads if kv_heads is None else kv_heads
        for name, value in (("features", features), ("inputs", inputs), ("heads", heads), ("kv_heads", kv_heads)):
            integer(name, value)
        if hidden is None:
            hidden = -(-features // 3) * 8 if gated else 4 * features
        integer("hidden", hidden)
        if features % heads:
            raise ValueError(f"heads must divide features, got heads={heads} and features={features}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
        self.damping = _only_in("damped", wiring, "damping", damping, 0.95)
        if self.damping is not None and self.damping > 1:
            raise ValueError(f"damping must be in (0, 1], got {damping!r}")
        self.gamma_max = _only_in("head", wiring, "gamma_max", gamma_max, 0.5)
        for name, value in (("causal", causal), ("decay", decay), ("bias", bias)):
            boolean(name, value)
        self.features, self.inputs, self.heads, self.kv_heads, self.hidden = features, inputs, heads, kv_heads, hidden
        self.wiring, self.activation, self.causal, self.rotary, self.decay = wiring, activation, causal, rotary, decay
        self.width = features // heads
        if rotary is not None:
            number("rotary", rotary, 0)
            if self.width % 2:
                raise ValueError(f"rotary positions need heads of even width, got {features=} and {heads=}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input = nn.Linear(inputs, features, bias=bias, **like)
        self.qkv = nn.Linear(features, (heads + 2 * kv_heads) * self.width, bias=bias, **like)
        self.output = nn.Linear(features, features, bias=bias, **like)
        self.up = nn.Linear(features, (1 + gated) * hidden, bias=bias, **like)
        self.down = nn.Linear(hidden, features, bias=bias, **like)
        self.input_norm, self.attention_norm, self.ffn_norm = (nn.RMSNorm(features, eps=_EPS, **like) for _ in range(3))
        if wiring == "outer":
            self.outer_norm = nn.RMSNorm(features, eps=_EPS, **like)
        self.attention_dropout, self.ffn_dropout = FixedDropout(dropout), FixedDropout(dropout)
        if decay:
            self.log_decay, self.gain = (nn.Parameter(torch.empty(features, **like)) for _ in range(2))
        if wiring == "head":
            self.scales = nn.Parameter(torch.empty(2, features, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws linears anew as nn.Linear does, the last of each branch times 0.3 but in "head"; resets the rest."""
        for module in self.children():
            if isinstance(module, nn.Linear | nn.RMSNorm):
                module.reset_parameters()
        if self.wiring == "head":
            self.scales.zero_()
        else:
            self.output.weight *= _LAST
            self.down.weight *= _LAST
        if self.decay:
            self.log_decay.fill_(-math.log(_DECAY)).log_()
            self.gain.fill_(1.0)

    def padded(self, x: Any, mask: Any) -> tuple[Any, Any]:
        return with_padding(x, mask), None

    def inject(self, x: Any) -> Injection:
        return self._injection(x, None)

    def extend(self, x: Any, past: Past | None) -> Injection:
        if not self.causal:
            raise ValueError("causal must be True to solve tokens one after another: Transformer has causal=False")
        return self._injection(x, past or Past(None, 0))

    def remember(self, z: Tensor, injection: Injection) -> Past:
        assert injection.past is not None and injection.past.store is not None
        store, at = injection.past.store, injection.past.tokens
        y = summed(injection.u, z, injection.decay)
        _, k, v = self._qkv(y if self.wiring == "damped" else self.attention_norm(y), injection)
        store.write(at, k, v)
        store.used = at + z.shape[1]
        return Past(store, store.used)

    def counts(self, injection: Injection) -> Tensor | None:
        return injection.real

    def initial(self, x: Any, injection: Injection) -> Tensor:
        return torch.zeros_like(injection.u)

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        if self.wiring == "head":
            (u, attended, fed), (first, second) = self._parts(z, injection), injection.scales
            return summed(summed(u, attended, first), fed, second)
        h, fed = self._parts(z, injection)
        _, n = sum_and_norm(h, fed, None, self._last_norm, sum_too=False)
        return n if self.damping is None else torch.lerp(z, n, self.damping)

    def tail(self, injection: Injection) -> tuple[Callable, Tail] | None:
        if self.wiring == "head":
            return self._parts, Tail(gains=injection.scales)
        norm = self._last_norm
        if not plain_norm(norm):
            return None
        return self._parts, Tail("rms", weight=norm.weight, eps=norm.eps or 0.0, mix=self.damping or 1.0)

    @property
    def _last_norm(self) -> nn.RMSNorm:
        return self.outer_norm if self.wiring == "outer" else self.ffn_norm

    def _parts(self, z: Tensor, injection: Injection) -> tuple[Tensor, ...]:
        """Returns the summands of f: the residual and the feed-forward branch, or u and both branches of "head"."""
        if self.wiring == "damped":
            y = summed(injection.u, z, injection.decay)
            _, h = sum_and_norm(y, self._attention(y, injection), None, self.attention_norm, sum_too=False)
            return h, self._ffn(h)
        y, n = sum_and_norm(injection.u, z, injection.decay, self.attention_norm)
        attended = self._attention(n, injection)
        h, n = sum_and_norm(y, attended, injection.scales[0], self.ffn_norm, sum_too=self.wiring == "outer")
        return (injection.u, attended, self._ffn(n)) if self.wiring == "head" else (h, self._ffn(n))

    def _qkv(self, h: Tensor, injection: Injection) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(h).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if injection.angles is not None:
            q, k = (rotated(t, *injection.angles) for t in (q, k))
        return q, k, v

    def _attention(self, h: Tensor, injection: Injection) -> Tensor:
        q, k, v = self._qkv(h, injection)
        if injection.past is not None and injection.past.store is not None:
            k, v = injection.past.store.write(injection.past.tokens, k, v)
        shared = self.heads // self.kv_heads
        if shared > 1 and injection.is_causal:
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
        elif shared > 1:  # the queries that share a key as further tokens: no copy of the keys
            q = q.unflatten(1, (self.kv_heads, shared)).flatten(2, 3)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=injection.mask, is_causal=injection.is_causal)
        if shared > 1 and not injection.is_causal:
            a = a.unflatten(2, (shared, h.shape[1])).flatten(1, 2)
        return self.attention_dropout(self.output(a.transpose(1, 2).flatten(2)))

    def _ffn(self, h: Tensor) -> Tensor:
        gate, *value = self.up(h).chunk(2 if self.activation == "swiglu" else 1, dim=-1)
        h = _ACTIVATIONS[self.activation](gate)
        return self.ffn_dropout(self.down(h * value[0] if value else h))

    def _injection(self, x: Any, past: Past | None) -> Injection:
        x, real = tokens_of(x, self.inputs, self)
        tokens, device = x.shape[1], x.device
        u = self.input_norm(self.input(x).to(self.input_norm.weight.dtype))
        decay: Tensor | None = None
        scales: tuple[Tensor | None, ...] = (None, None)
        if self.decay:
            decay, u = torch.exp(-torch.exp(self.log_decay)), self.gain * u
        if self.gamma_max is not None:
            scales = (self.gamma_max * torch.sigmoid(self.scales)).unbind()
        at = 0 if past is None else past.tokens
        angles = None if self.rotary is None else rotary_angles(at, tokens, self.width, self.rotary, u)
        past, keys = (None, real) if past is None else self._room(past, u, real)
        mask, is_causal = None, False
        if self.causal and keys is None and (at == 0 or tokens <= 1):
            is_causal = at == 0
        elif self.causal or keys is not None:
            mask = attention_mask(at, tokens, keys, self.causal, device)
            if mask.shape[2] > 1:
                mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)
        return Injection(u, decay, scales, angles, real, mask, is_causal, past)

    def _room(self, past: Past, u: Tensor, real: Tensor | None) -> tuple[Past, Tensor | None]:
        """Returns (the past with room for the tokens of u, the mask of real tokens among all)."""
        store, at = past
        batch, tokens, _ = u.shape
        kind, dtype = u.device.type, self.qkv.weight.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if store is None:
            store = Store(batch, self.kv_heads, self.width, tokens, dtype, u.device)
        elif store.keys.dtype != dtype:
            raise ValueError(f"cache holds keys in {store.keys.dtype}, and this step makes them in {dtype}")
        store = store.room(at, tokens)
        store.real[:, at : at + tokens] = True if real is None else real
        store.padded |= real is not None
        return Past(store, at), store.real[:, : at + tokens] if store.padded else None


def _only_in(only: str, wiring: str, name: str, value: float | None, default: float) -> float | None:
    """Returns the option of one wiring or its default, and None in others; raises if it is given there."""
    if wiring == only:
        value = default if value is None else value
        number(name, value, 0)
    elif value is not None:
        raise ValueError(f"{name} is for wiring={only!r}, got {name}={value!r} with wiring={wiring!r}")
    return value
