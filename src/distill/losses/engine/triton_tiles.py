"""What the Triton kernel of `triton_rows.py` computes of one tile of a row: logits, divergences and running sums.

Under the matrix products before and after it a GPU lowers its clock, so instructions count as much as bytes: logarithms
are to base 2, as the hardware has them.

Names: x student's logit, y teacher's, q and p their probabilities at T; v ids of a tile, four neighbours along its
second dimension, which one thread reads at once.
A side is a model's row: (pointer, pointer to its bias, scale, soft-cap). FINISH says which of bias (1), scale (2) and
soft-cap (4) it has.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-144269.5)  # -1e5 nats, as in divergence.py
TINY = tl.constexpr(1.1754944e-38)  # the least normal number of fp32
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def tile(start: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Ids from `start` on, (BLOCK / 4, 4)."""
    return start + 4 * tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def tanh(u: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent to the last bits of fp32: a series near 0, where the difference cancels."""
    w = u * u
    series = u + u * w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835))))
    return tl.where(tl.abs(u) < 0.25, series, 1 - 2 / (1 + tl.exp2(u * (2 * LOG2_E))))


@triton.jit
def logits(side: tl.tuple, v: tl.tensor, width: tl.tensor, FINISH: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """Logits of a tile with bias, scale and soft-cap; -inf from `width` on, which only a MASKED tile reaches."""
    if MASKED:
        x = tl.load(side[0] + v, mask=v < width, other=0.0).to(tl.float32)
    else:
        x = tl.load(side[0] + v).to(tl.float32)
    if FINISH % 2:
        if MASKED:
            x += tl.load(side[1] + v, mask=v < width, other=0.0).to(tl.float32)
        else:
            x += tl.load(side[1] + v).to(tl.float32)
    if FINISH // 2 % 2:
        x *= side[2]
    if FINISH // 4:
        x = side[3] * tanh(x * (1 / side[3]))
    if MASKED:
        x = tl.where(v < width, x, -float("inf"))
    return x


@triton.jit
def logprobs(x: tl.tensor, largest: tl.tensor, log_sum: tl.tensor, c: tl.tensor) -> tl.tensor:
    """Floored log2-probabilities at T; a NaN stays one."""
    return tl.maximum((x - largest) * c - log_sum, FLOOR, propagate_nan=ALL)


@triton.jit
def log_mixture(first: tl.tensor, second: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """log2(weight first + (1 - weight) second)."""
    return tl.log2(tl.maximum(weight * first + (1 - weight) * second, TINY, propagate_nan=ALL))


@triton.jit
def terms(log_q: tl.tensor, log_p: tl.tensor, share: tl.tensor, KIND: tl.constexpr) -> tl.tuple:
    """q, p, what each id adds to the divergence, and g in the gradient q (g - mean of g under q).

    Value and g are to base 2 but for total variation, and the caller's factors put that right. For JSD the factor
    1 - beta of the gradient is the caller's too; forward KL needs no g, for its gradient is q - p.
    """
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    if KIND == "forward_kl":
        g = log_q
        value = p * (log_p - log_q)
    elif KIND == "reverse_kl":
        g = log_q - log_p
        value = q * g
    elif KIND == "jsd":
        log_m = log_mixture(p, q, share)
        g = log_q - log_m
        value = share * p * (log_p - log_m) + (1 - share) * q * g
    elif KIND == "skew_forward_kl":
        ratio = log_p - log_mixture(p, q, share)
        value = p * ratio
        g = (share - 1) * LOG2_E * tl.exp2(ratio)
    elif KIND == "skew_reverse_kl":
        ratio = log_q - log_mixture(q, p, share)
        value = q * ratio
        g = ratio - share * LOG2_E * tl.exp2(ratio)
    else:  # total variation
        value = 0.5 * tl.abs(q - p)
        g = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return q, p, value, g


@triton.jit
def add(x: tl.tensor, top: tl.tensor, total: tl.tensor, c: tl.tensor) -> tl.tuple:
    """Running maxima of a tile's rows and sums of exp2(c (x - maximum)), and by what these shrank."""
    higher = tl.maximum(top, tl.max(x, 1))
    shrink = tl.exp2((top - higher) * c)
    return higher, total * shrink + tl.sum(tl.exp2((x - higher[:, None]) * c), 1), shrink
