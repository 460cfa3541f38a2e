"""The rows of the loss engine as one Triton kernel: logits in, values and the gradient of the head's linear map out.

One program walks along a row of both models' logits: once for maxima and sums, once more where the gradient needs a
mean over the row that these sums do not give (JSD, skew, total variation), and once for value and gradient. A walk that
follows another goes backwards, so that it finds in the cache what the one before read last. The functions of `rows.py`
are the same mathematics for a CPU and for everything that this kernel does not do: sparse targets, metrics, float64.

Under the matrix products before and after it a GPU lowers its clock, so instructions count as much as bytes: logarithms
are to base 2, as the hardware has them, and no thread waits for another before the end of a walk.

This file needs triton and is imported by `fused.py` alone, where the kernel is first launched.

Names: x student's logit, y teacher's, q and p their probabilities at T, m their mixture; v ids of a tile of a row, four
neighbours along its second dimension, which one thread reads at once.
A side is a model's row: (pointer, pointer to its bias, scale, soft-cap). FINISH says which of bias (1), scale (2) and
soft-cap (4) it has; eight times the teacher's is added to the student's.
"""

import triton
import triton.language as tl

from distill.losses.engine.triton_tiles import FLOOR, LN_2, LOG2_E, add, logits, logprobs, terms, tile


@triton.jit
def _add_both(
    v: tl.tensor,
    student: tl.tuple,
    teacher: tl.tuple,
    widths: tl.tuple,
    c: tl.tensor,
    sums: tl.tuple,
    KIND: tl.constexpr,
    ALONE: tl.constexpr,
    FINISH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """The running sums of `_sums` after one more tile; x at T = 1 is ALONE where it is not what x at T is."""
    top, sum_1, top_x, sum_x, top_y, sum_y, cross = sums
    x = logits(student, v, widths[0], FINISH % 8, MASKED)
    if ALONE:
        top, sum_1, _ = add(x, top, sum_1, LOG2_E)
    if KIND != "none":
        y = logits(teacher, v, widths[1], FINISH // 8, MASKED)
        if MASKED:
            x = tl.where(v < widths[1], x, -float("inf"))
        before_x, before_y, before_sum = top_x, top_y, sum_x
        top_x, sum_x, shrink = add(x, top_x, sum_x, c)
        top_y, sum_y, _ = add(y, top_y, sum_y, c)
        if KIND == "reverse_kl":  # of exp2(c (x - top_x)) ((x - top_x) - (y - top_y))
            x, y = x - top_x[:, None], y - top_y[:, None]
            moved = tl.where(before_sum == 0, 0.0, (before_x - top_x) - (before_y - top_y))
            apart = tl.maximum(x, FLOOR) - tl.maximum(y, FLOOR)
            cross = (cross + before_sum * moved) * shrink + tl.sum(tl.exp2(x * c) * apart, 1)
    return top, sum_1, top_x, sum_x, top_y, sum_y, cross


@triton.jit
def _sums(
    student: tl.tuple,
    teacher: tl.tuple,
    widths: tl.tuple,
    full: tl.tensor,
    c: tl.tensor,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    SAME: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """Largest logit and log2 of the sum of exponentials, of x at T = 1, of x over the shared ids and of y, both at T;
    and the mean of log2(q / p) under q for reverse KL.
    """
    ALONE: tl.constexpr = KIND == "none" or (LM and not SAME)
    lowest = tl.full([BLOCK // 4], -1e38, tl.float32)  # finite, so that a tile of excluded ids adds 0 and not NaN
    zero = tl.zeros([BLOCK // 4], tl.float32)
    top, sum_1, top_x, sum_x, top_y, sum_y, cross = lowest, zero, lowest, zero, lowest, zero, zero
    for start in range(0, full, BLOCK):
        top, sum_1, top_x, sum_x, top_y, sum_y, cross = _add_both(
            tile(start, BLOCK), student, teacher, widths, c, (top, sum_1, top_x, sum_x, top_y, sum_y, cross), KIND,
            ALONE, FINISH, False,
        )  # fmt: skip
    for start in range(full, widths[0], BLOCK):
        top, sum_1, top_x, sum_x, top_y, sum_y, cross = _add_both(
            tile(start, BLOCK), student, teacher, widths, c, (top, sum_1, top_x, sum_x, top_y, sum_y, cross), KIND,
            ALONE, FINISH, True,
        )  # fmt: skip
    all_x, all_y = tl.max(top_x), tl.max(top_y)
    weight = tl.exp2((top_x - all_x) * c)
    total_x, total_y = tl.sum(sum_x * weight), tl.sum(sum_y * tl.exp2((top_y - all_y) * c))
    log_x, log_y, mean = tl.log2(total_x), tl.log2(total_y), 0.0
    if KIND == "reverse_kl":
        cross += tl.where(sum_x == 0, 0.0, sum_x * ((top_x - all_x) - (top_y - all_y)))
        mean = tl.sum(cross * weight) / total_x * c - log_x + log_y
    if ALONE:
        all_1 = tl.max(top)
        log_1 = tl.log2(tl.sum(sum_1 * tl.exp2((top - all_1) * LOG2_E)))
    else:
        all_1, log_1 = all_x, log_x
    return all_1, log_1, all_x, log_x, all_y, log_y, mean


@triton.jit
def _mean_tile(
    v: tl.tensor,
    student: tl.tuple,
    teacher: tl.tuple,
    shared: tl.tensor,
    sums: tl.tuple,
    numbers: tl.tuple,
    KIND: tl.constexpr,
    FINISH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """What a tile adds to the divergence and to the mean of g under q."""
    x = logits(student, v, shared, FINISH % 8, MASKED)
    y = logits(teacher, v, shared, FINISH // 8, MASKED)
    log_q, log_p = logprobs(x, sums[2], sums[3], numbers[0]), logprobs(y, sums[4], sums[5], numbers[0])
    q, _, value, g = terms(log_q, log_p, numbers[1], KIND)
    return tl.sum(value, 1), tl.sum(q * g, 1)


@triton.jit
def _mean(
    student: tl.tuple,
    teacher: tl.tuple,
    shared: tl.tensor,
    sums: tl.tuple,
    numbers: tl.tuple,
    KIND: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """The divergence of a row, and the mean of g under q; backwards."""
    full = shared // BLOCK * BLOCK
    values = tl.zeros([BLOCK // 4], tl.float32)
    means = tl.zeros([BLOCK // 4], tl.float32)
    if full < shared:
        value, mean = _mean_tile(
            tile(full, BLOCK), student, teacher, shared, sums, numbers, KIND, FINISH, True
        )  # fmt: skip
        values += value
        means += mean
    for done in range(BLOCK, full + BLOCK, BLOCK):
        value, mean = _mean_tile(
            tile(full - done, BLOCK), student, teacher, shared, sums, numbers, KIND, FINISH, False
        )  # fmt: skip
        values += value
        means += mean
    return tl.sum(values), tl.sum(means)


@triton.jit
def _last_tile(
    v: tl.tensor,
    student: tl.tuple,
    teacher: tl.tuple,
    gradient: tl.tensor,
    label: tl.tensor,
    widths: tl.tuple,
    sums: tl.tuple,
    mean: tl.tensor,
    numbers: tl.tuple,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    SAME: tl.constexpr,
    GRADIENT: tl.constexpr,
    FINISH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Writes the gradient of a tile; returns what it adds to the divergence."""
    c, share, kd_factor, lm_factor = numbers
    x = logits(student, v, widths[0], FINISH % 8, MASKED)
    total = x * 0.0
    value = x * 0.0
    if KIND != "none":
        y = logits(teacher, v, widths[1], FINISH // 8, MASKED)
        shared_x = x
        if MASKED:
            shared_x = tl.where(v < widths[1], x, -float("inf"))
        log_q, log_p = logprobs(shared_x, sums[2], sums[3], c), logprobs(y, sums[4], sums[5], c)
        q, p, value, g = terms(log_q, log_p, share, KIND)
        if KIND == "forward_kl":
            total = kd_factor * (q - p)
        else:
            total = kd_factor * q * (g - mean)
    if LM:
        if SAME:
            total += lm_factor * q
        else:
            total += lm_factor * tl.exp2((x - sums[0]) * LOG2_E - sums[1])
        total -= tl.where(v == label, lm_factor, 0.0)
    if FINISH // 4 % 2:
        total *= 1 - (x / student[3]) * (x / student[3])
    if GRADIENT:
        if MASKED:
            tl.store(gradient + v, total.to(gradient.dtype.element_ty), mask=v < widths[0])
        else:
            tl.store(gradient + v, total.to(gradient.dtype.element_ty))
    return tl.sum(value, 1)


@triton.jit
def _last(
    student: tl.tuple,
    teacher: tl.tuple,
    gradient: tl.tensor,
    label: tl.tensor,
    widths: tl.tuple,
    full: tl.tensor,
    sums: tl.tuple,
    mean: tl.tensor,
    numbers: tl.tuple,
    KIND: tl.constexpr,
    LM: tl.constexpr,
    SAME: tl.constexpr,
    GRADIENT: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Writes the gradient of a row; returns its divergence. From the end where the walk before it arrived."""
    BACK: tl.constexpr = KIND == "none" or KIND == "forward_kl" or KIND == "reverse_kl"
    values = tl.zeros([BLOCK // 4], tl.float32)
    for done in range(0, full, BLOCK):
        start = done
        if BACK:
            start = full - BLOCK - done
        values += _last_tile(
            tile(start, BLOCK), student, teacher, gradient, label, widths, sums, mean, numbers, KIND, LM, SAME,
            GRADIENT, FINISH, False,
        )  # fmt: skip
    for start in range(full, widths[0], BLOCK):
        values += _last_tile(
            tile(start, BLOCK), student, teacher, gradient, label, widths, sums, mean, numbers, KIND, LM, SAME,
            GRADIENT, FINISH, True,
        )  # fmt: skip
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
    SAME: tl.constexpr,
    GRADIENT: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of V ids: values at `kd_values` and `lm_values`, gradient at `gradient`, which may be the logits.

    Args:
        student, teacher, gradient: first elements, whose rows stand so many elements apart.
        labels: int64 id per row.
        student_bias, teacher_bias, student_scale, student_cap, teacher_scale, teacher_cap: of the heads, see `LMHead`;
            read where FINISH says so.
        vocab, shared: ids of the student, and those that KD compares.
        inv_t: 1 / T.
        share: beta or alpha of the divergence.
        kd_factor, lm_factor: of the gradients with respect to logits / T and logits.
        KIND: the divergence, or "none".
        LM, GRADIENT: whether there is an LM loss, and a gradient to write.
        SAME: whether the student's softmax in both losses is one: T is 1 and `shared` is `vocab`.
        BLOCK: ids at a time, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    gradient += row * gradient_stride
    one = (student + row * student_stride, student_bias, student_scale, student_cap)
    other = (teacher + row * teacher_stride, teacher_bias, teacher_scale, teacher_cap)
    unit: tl.constexpr = 1.0 if KIND == "total_variation" else LN_2  # of values and g, see `terms`
    scaled: tl.constexpr = 1.0 if KIND == "total_variation" or KIND == "forward_kl" else LN_2
    widths, c = (vocab, shared), inv_t * LOG2_E
    full = shared // BLOCK * BLOCK  # from where on tiles are masked
    numbers = (c, share, kd_factor * scaled, lm_factor)
    sums = _sums(one, other, widths, full, c, KIND, LM, SAME, FINISH, BLOCK)
    label = tl.load(labels + row)
    if LM:
        at_label = logits(one, label, vocab, FINISH % 8, False)
        tl.store(lm_values + row, sums[0] - at_label + sums[1] * LN_2)
    TWO: tl.constexpr = KIND == "none" or KIND == "forward_kl" or KIND == "reverse_kl"
    value, mean = 0.0, sums[6]
    if not TWO:
        value, mean = _mean(one, other, shared, sums, numbers, KIND, FINISH, BLOCK)
    if GRADIENT or TWO:
        tl.debug_barrier()  # the gradient may overwrite the label's logit, which every thread must have read
        found = _last(
            one, other, gradient, label, widths, full, sums, mean, numbers, KIND, LM, SAME, GRADIENT, FINISH, BLOCK
        )
        if TWO:
            value = found
    if KIND != "none":
        tl.store(kd_values + row, value * unit)
