"""The rows of the loss engine as one Triton kernel: logits in, values and the gradient of the head's linear map out.

One program walks along a row of both models' logits: once for maxima and sums, once more where the gradient needs a
mean over the row that these sums do not give (JSD, skew, total variation), and once for value and gradient. A walk that
follows another goes backwards, so that it finds in the cache what the one before read last. The functions of `rows.py`
are the same mathematics for a CPU and for everything that this kernel does not do: sparse targets, metrics, float64.

This file needs triton and is imported by `fused.py` alone, where the kernel is first launched.

Names: x student's logit, y teacher's, q and p their probabilities at T, m their mixture; v ids of a block of a row.
A side is a model's row: (pointer, pointer to its bias, scale, soft-cap).
"""

import triton
import triton.language as tl

LOG_FLOOR = tl.constexpr(-1e5)  # as in divergence.py
TINY = tl.constexpr(1.1754944e-38)  # the least normal number of fp32
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _tanh(u: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent to the last bits of fp32: a series near 0, where the quotient of exponentials cancels."""
    w = u * u
    series = u + u * w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835))))
    decay = tl.exp(-2 * tl.abs(u))
    quotient = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(u) < 0.25, series, tl.where(u < 0, -quotient, quotient))


@triton.jit
def _logits(side: tl.tuple, v: tl.tensor, width: tl.tensor, BIAS: tl.constexpr, CAP: tl.constexpr) -> tl.tensor:
    """Logits of a block of ids with bias, scale and soft-cap; -inf beyond `width`."""
    x = tl.load(side[0] + v, mask=v < width, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(side[1] + v, mask=v < width, other=0.0).to(tl.float32)
    x *= side[2]
    if CAP:
        x = side[3] * _tanh(x / side[3])
    return tl.where(v < width, x, -float("inf"))


@triton.jit
def _logprobs(x: tl.tensor, largest: tl.tensor, log_sum: tl.tensor, inv_t: tl.tensor) -> tl.tensor:
    """Floored log-probabilities at T; a NaN stays one."""
    return tl.maximum((x - largest) * inv_t - log_sum, LOG_FLOOR, propagate_nan=ALL)


@triton.jit
def _log_mixture(first: tl.tensor, second: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """log(weight first + (1 - weight) second)."""
    return tl.log(tl.maximum(weight * first + (1 - weight) * second, TINY, propagate_nan=ALL))


@triton.jit
def _terms(log_q: tl.tensor, log_p: tl.tensor, share: tl.tensor, KIND: tl.constexpr) -> tl.tuple:
    """q, p, what each id adds to the divergence, and g in the gradient q (g - mean of g under q).

    For JSD the factor 1 - beta of the gradient is the caller's; forward KL needs no g, for its gradient is q - p.
    """
    q, p = tl.exp(log_q), tl.exp(log_p)
    if KIND == "forward_kl":
        g = log_q
        value = p * (log_p - log_q)
    elif KIND == "reverse_kl":
        g = log_q - log_p
        value = q * g
    elif KIND == "jsd":
        log_m = _log_mixture(p, q, share)
        g = log_q - log_m
        value = share * p * (log_p - log_m) + (1 - share) * q * g
    elif KIND == "skew_forward_kl":
        ratio = log_p - _log_mixture(p, q, share)
        value = p * ratio
        g = (share - 1) * tl.exp(ratio)
    elif KIND == "skew_reverse_kl":
        ratio = log_q - _log_mixture(q, p, share)
        value = q * ratio
        g = ratio - share * tl.exp(ratio)
    else:  # total variation
        value = 0.5 * tl.abs(q - p)
        g = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return q, p, value, g


@triton.jit
def _sums(
    student: tl.tuple,
    teacher: tl.tuple,
    widths: tl.tuple,
    inv_t: tl.tensor,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    WHOLE: tl.constexpr,
    BIASES: tl.constexpr,
    CAPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """Largest logit and log of the sum of exponentials, of x at T = 1, of x over the shared ids and of y, both at T;
    and the mean of log(q / p) under q, in running form, for reverse KL.
    """
    lowest = tl.full([], -1e38, tl.float32)  # finite, so that a block of excluded ids adds 0 and not NaN
    top, top_x, top_y = lowest, lowest, lowest
    sum_1 = tl.zeros([BLOCK], tl.float32)
    sum_x = tl.zeros([BLOCK], tl.float32)
    sum_y = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)  # of exp((x - top_x) / T) ((x - top_x) - (y - top_y))
    for start in range(0, widths[0], BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = _logits(student, v, widths[0], BIASES % 2, CAPS % 2)
        if LM or KIND == "none":
            before, top = top, tl.maximum(top, tl.max(x))
            sum_1 = sum_1 * tl.exp(before - top) + tl.exp(x - top)
        if KIND != "none":
            y = _logits(teacher, v, widths[1], BIASES // 2, CAPS // 2)
            if not WHOLE:
                x = tl.where(v < widths[1], x, -float("inf"))
            before_x, top_x = top_x, tl.maximum(top_x, tl.max(x))
            before_y, top_y = top_y, tl.maximum(top_y, tl.max(y))
            e = tl.exp((x - top_x) * inv_t)
            shrink = tl.exp((before_x - top_x) * inv_t)
            if KIND == "reverse_kl":
                moved = tl.where(sum_x == 0, 0.0, (before_x - top_x) - (before_y - top_y))
                apart = tl.maximum(x - top_x, LOG_FLOOR) - tl.maximum(y - top_y, LOG_FLOOR)
                cross = (cross + sum_x * moved) * shrink + e * apart
            sum_x = sum_x * shrink + e
            sum_y = sum_y * tl.exp((before_y - top_y) * inv_t) + tl.exp((y - top_y) * inv_t)
    total_x, total_y = tl.sum(sum_x), tl.sum(sum_y)
    log_x, log_y = tl.log(total_x), tl.log(total_y)
    return top, tl.log(tl.sum(sum_1)), top_x, log_x, top_y, log_y, tl.sum(cross) / total_x * inv_t - log_x + log_y


@triton.jit
def _mean(
    student: tl.tuple,
    teacher: tl.tuple,
    shared: tl.tensor,
    sums: tl.tuple,
    inv_t: tl.tensor,
    share: tl.tensor,
    KIND: tl.constexpr,
    BIASES: tl.constexpr,
    CAPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """The divergence of a row, and the mean of g under q."""
    values = tl.zeros([BLOCK], tl.float32)
    means = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(shared, BLOCK)
    for i in range(0, blocks):
        v = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        x = _logits(student, v, shared, BIASES % 2, CAPS % 2)
        y = _logits(teacher, v, shared, BIASES // 2, CAPS // 2)
        log_q, log_p = _logprobs(x, sums[2], sums[3], inv_t), _logprobs(y, sums[4], sums[5], inv_t)
        q, _, value, g = _terms(log_q, log_p, share, KIND)
        values += value
        means += q * g
    return tl.sum(values), tl.sum(means)


@triton.jit
def _last(
    student: tl.tuple,
    teacher: tl.tuple,
    gradient: tl.tensor,
    label: tl.tensor,
    widths: tl.tuple,
    sums: tl.tuple,
    mean: tl.tensor,
    inv_t: tl.tensor,
    share: tl.tensor,
    factors: tl.tuple,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIASES: tl.constexpr,
    CAPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Writes the gradient of a row; returns its divergence."""
    values = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(widths[0], BLOCK)
    TWO: tl.constexpr = KIND == "none" or KIND == "forward_kl" or KIND == "reverse_kl"
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK if TWO else i * BLOCK  # away from where the walk before it ended
        v = start + tl.arange(0, BLOCK)
        x = _logits(student, v, widths[0], BIASES % 2, CAPS % 2)
        total = tl.zeros([BLOCK], tl.float32)
        if KIND != "none":
            y = _logits(teacher, v, widths[1], BIASES // 2, CAPS // 2)
            shared_x = tl.where(v < widths[1], x, -float("inf"))
            log_q, log_p = _logprobs(shared_x, sums[2], sums[3], inv_t), _logprobs(y, sums[4], sums[5], inv_t)
            q, p, value, g = _terms(log_q, log_p, share, KIND)
            values += value
            if KIND == "forward_kl":
                total = factors[0] * (q - p)
            else:
                total = factors[0] * q * (g - mean)
        if LM:
            total += factors[1] * (tl.exp(x - sums[0] - sums[1]) - tl.where(v == label, 1.0, 0.0))
        if CAPS % 2:
            total *= 1 - (x / student[3]) * (x / student[3])
        if GRADIENT:
            tl.store(gradient + v, total.to(gradient.dtype.element_ty), mask=v < widths[0])
    return tl.sum(values)


@triton.jit
def fused_rows(
    student: tl.tensor,
    teacher: tl.tensor,
    gradient: tl.tensor,
    labels: tl.tensor,
    kd_values: tl.tensor,
    lm_values: tl.tensor,
    student_bias: tl.tensor,
    teacher_bias: tl.tensor,
    vocab: tl.tensor,
    shared: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    gradient_stride: tl.tensor,
    student_scale: tl.tensor,
    student_cap: tl.tensor,
    teacher_scale: tl.tensor,
    teacher_cap: tl.tensor,
    inv_t: tl.tensor,
    share: tl.tensor,
    kd_factor: tl.tensor,
    lm_factor: tl.tensor,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BIASES: tl.constexpr,
    CAPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of V ids: values at `kd_values` and `lm_values`, gradient at `gradient`, which may be the logits.

    Args:
        student, teacher, gradient: first elements, whose rows stand so many elements apart.
        labels: int64 id per row.
        student_bias, teacher_bias: read where BIASES says so.
        vocab, shared: ids of the student, and those that KD compares.
        student_scale, student_cap, teacher_scale, teacher_cap: of the heads, see `LMHead`.
        inv_t: 1 / T.
        share: beta or alpha of the divergence.
        kd_factor, lm_factor: of the gradients with respect to logits / T and logits.
        KIND: the divergence, or "none".
        LM, GRADIENT: whether there is an LM loss, and a gradient to write.
        WHOLE: whether `shared` is `vocab`.
        BIASES, CAPS: 1 for the student's + 2 for the teacher's.
        BLOCK: ids at a time, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    gradient += row * gradient_stride
    one = (student + row * student_stride, student_bias, student_scale, student_cap)
    other = (teacher + row * teacher_stride, teacher_bias, teacher_scale, teacher_cap)
    widths, factors = (vocab, shared), (kd_factor, lm_factor)
    sums = _sums(one, other, widths, inv_t, KIND, LM, WHOLE, BIASES, CAPS, BLOCK)
    label = tl.load(labels + row)
    if LM:
        at_label = _logits(one, label, vocab, BIASES % 2, CAPS % 2)
        tl.store(lm_values + row, sums[0] - at_label + sums[1])
    TWO: tl.constexpr = KIND == "none" or KIND == "forward_kl" or KIND == "reverse_kl"
    value, mean = 0.0, sums[6]
    if not TWO:
        value, mean = _mean(one, other, shared, sums, inv_t, share, KIND, BIASES, CAPS, BLOCK)
    if GRADIENT or TWO:
        tl.debug_barrier()  # the gradient may overwrite the label's logit, which every thread must have read
        found = _last(
            one, other, gradient, label, widths, sums, mean, inv_t, share, factors, KIND, LM, GRADIENT, BIASES, CAPS,
            BLOCK,
        )  # fmt: skip
        if TWO:
            value = found
    if KIND != "none":
        tl.store(kd_values + row, value)
