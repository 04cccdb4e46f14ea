"""The coupling's scale map, per element, as Triton device functions: the counterpart of csrc/formulas.h.

Bounds keep NaN, one instruction either way: without `propagate_nan` a GPU takes the bound in its place, though the
interpreter doesn't.
"""

import triton
import triton.language as tl


@triton.jit
def rectified(x):
    """max(x, 0), and NaN where x is."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponential(x):
    """e^x to about two units in the last place over the whole range, with gradual underflow: the hardware's exp2 alone
    loses digits for large arguments, because x / ln 2 is rounded before it is raised."""
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 89.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, the first with few bits so that its multiples are exact.
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    # 2^n in two factors: n runs from -150 to 128, and the hardware's exp2 gives zero below 2^-126.
    half = tl.floor(n * 0.5)
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)): relative precision also for tiny e."""
    s = e / (2.0 + e)
    t = s * s
    p = 1.161216461e-1
    p = p * t + 1.08532879e-1
    p = p * t + 1.4296179e-1
    p = p * t + 1.999985317e-1
    p = p * t + 3.333333366e-1
    return 2.0 * (s + s * t * p)


@triton.jit
def tangent(u):
    """tanh(u) and its derivative, both to relative precision."""
    e = exponential(-2.0 * tl.abs(u))
    sum_ = 1.0 + e
    t = u * u
    # 1 - e cancels for small u; there a few terms of the series are exact to rounding.
    series = tl.abs(u) * (1.0 + t * (-0.33333333333 + t * (0.13333333333 + t * (-0.053968253968 + t * 0.021869488536))))
    magnitude = tl.where(tl.abs(u) < 0.2, series, (1.0 - e) / sum_)
    return tl.where(u < 0.0, -magnitude, magnitude), 4.0 * e / (sum_ * sum_)


@triton.jit
def scale_terms(raw, alpha, SCALE: tl.constexpr):
    """log s, s, 1/s and d log s / d raw at fp32 raw values. SCALE is "softclamp" or "sigmoid"."""
    if SCALE == "softclamp":
        th, slope = tangent(raw / alpha)
        log_s = alpha * th
        return log_s, exponential(log_s), exponential(-log_s), slope
    else:
        u = raw + 2.0
        e = exponential(-tl.abs(u))
        r = 1.0 / (1.0 + e)
        negative = u < 0.0
        log_s = tl.where(negative, u, 0.0) - log1p_unit(e)
        s = tl.where(negative, e * r, r)
        inverse_s = 1.0 + tl.where(negative, 1.0 / e, e)
        slope = tl.where(negative, r, e * r)
        return log_s, s, inverse_s, slope
