"""Calls of every pixel op on random operands, and the judgement of a backend's results from the data.

A backend's error against the fp64 reference may be at most twice that of the reference in the same precision, plus a
few units in the last place. Errors are pooled over shapes, so that no budget hangs on one lucky number.
"""

import functools
import itertools

import torch

from flowkern import backend as backends
from flowkern import reference

FLOAT, DOUBLE = torch.float32, torch.float64
SHAPES = ((1, 2, 1, 1), (3, 4, 1, 1), (2, 6, 5, 3), (3, 10, 1, 7), (1, 12, 9, 11), (2, 24, 5, 13), (1, 48, 7, 9),
          (2, 96, 6, 7), (2, 34, 8, 8))
MANY_PIXELS = ((2, 12, 64, 96),)
PRECISIONS = {"fp32": (FLOAT, FLOAT), "bf16": (FLOAT, torch.bfloat16), "fp16": (FLOAT, torch.float16),
              "fp64": (DOUBLE, DOUBLE)}
SPREADS = {"moderate": 1.0, "extreme": 40.0}
COUPLINGS = [op for op in backends.OPS if "couple" in op]
MIXES = ("channel_mix", "couple_mix", "mix_couple", "mix_vjp")


class Inputs:
    """Random operands for one shape, in the precisions of a call."""

    def __init__(self, shape, dtype, h_dtype, spread=1.0):
        self.shape, self.dtype, self.h_dtype, self.spread = shape, dtype, h_dtype, spread
        self.generator = torch.Generator().manual_seed(sum(shape))

    def normal(self, *shape, dtype=None):
        values = torch.randn(*shape, generator=self.generator, dtype=DOUBLE).to(dtype or self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def state(self):
        return self.normal(*self.shape)

    def network(self, scale):
        """(raw, t), or t. The raw values have a mean, so that log-determinants are not sums that cancel."""
        n, c, height, width = self.shape
        if scale == "additive":
            return self.normal(n, c // 2, height, width, dtype=self.h_dtype)
        h = self.normal(n, c, height, width, dtype=DOUBLE)
        h[:, : c // 2] = (h[:, : c // 2] + 0.5) * self.spread
        return h.to(self.h_dtype)

    def mix(self):
        """A well-conditioned matrix, its inverse (in transposed memory, as torch.linalg.inv returns it), an offset."""
        c = self.shape[1]
        stretch = torch.exp(0.2 * self.normal(c, dtype=DOUBLE))
        matrix = torch.linalg.qr(self.normal(c, c, dtype=DOUBLE))[0] * stretch
        inverse = torch.linalg.inv(matrix)
        return matrix.to(self.dtype), inverse.mT.contiguous().to(self.dtype).mT, self.normal(c)


def arguments(op, shape, dtype, h_dtype, spread=1.0):
    """Every kind of call of one op, as (label, positional arguments); the same labels for every shape."""
    make = Inputs(shape, dtype, h_dtype, spread)
    flags = (False, True)
    if op == "channel_mix":
        matrix, inverse_matrix, offset = make.mix()
        yield "forward", (make.state(), matrix, offset, False)
        yield "inverse", (make.state(), inverse_matrix, offset, True)
    elif op == "mix_vjp":
        matrix, inverse_matrix, offset = make.mix()
        for inverse, given in itertools.product(flags, flags):
            yield (f"inverse={inverse} given={given}",
                   (make.state(), make.state(), matrix, inverse_matrix, offset, inverse, given))
    elif op in ("shrink", "shrink_vjp", "data_consistency", "data_consistency_vjp"):
        strength = torch.tensor(0.3, dtype=dtype)
        for label, flat in (("image", False), ("latent", True)):
            x, y, noise = (make.state().flatten(1) if flat else make.state() for _ in range(3))
            # Cotangents resemble what they meet in the sum over all elements, so that the sum does not cancel.
            yield label, {"shrink": (x, strength), "shrink_vjp": (x, x + noise, strength),
                          "data_consistency": (x, y, strength),
                          "data_consistency_vjp": (x, y, x - y + noise, strength)}[op]
    else:
        for scale, alpha in [("softclamp", 1.0), ("softclamp", 0.7), ("sigmoid", 1.0), ("additive", 1.0)]:
            label, x, h = f"{scale} alpha={alpha}", make.state(), make.network(scale)
            if op == "couple":
                for inverse in flags:
                    yield f"{label} inverse={inverse}", (x, h, scale, alpha, inverse)
            elif op == "couple_vjp":
                g, glogdet = make.state(), make.normal(shape[0])
                for inverse, given in itertools.product(flags, flags):
                    yield f"{label} inverse={inverse} given={given}", (x, g, h, glogdet, scale, alpha, inverse, given)
            else:
                matrix, inverse_matrix, offset = make.mix()
                yield label, (x, h, matrix if op == "couple_mix" else inverse_matrix, offset, scale, alpha)


def converted(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def results(function, args):
    """The op's results as a tuple; a log-determinant that comes as partial sums (N, parts) is added up."""
    out = function(*args)
    if not isinstance(out, tuple):
        return (out,)
    partial = len(out) == 2 and out[0].dim() == 4 and out[1].dim() == 2
    return (out[0], out[1].sum(dim=1)) if partial else out


@functools.cache
def cases(op, dtype, h_dtype, spread, shapes):
    """For each label: its arguments, the reference's results in their precision, and in fp64, each one per shape."""
    calls = {}
    for shape in shapes:
        for label, args in arguments(op, shape, dtype, h_dtype, spread):
            calls.setdefault(label, []).append(args)
    run = functools.partial(results, getattr(reference, op))
    return {label: (many, [run(args) for args in many], [run(converted(args, DOUBLE)) for args in many])
            for label, many in calls.items()}


def errors(op, values, exact, where):
    """The largest and the root-mean-square error over all tensors, where the reference is finite.

    Relative to a number's own size plus the typical size; after a matrix product, to the largest channel of its pixel.
    """
    typical = torch.cat([e[w] for e, w in zip(exact, where, strict=True)]).abs().quantile(0.5)
    relative = []
    for value, e, w in zip(values, exact, where, strict=True):
        size = e.abs().nan_to_num(posinf=0)
        size = size.amax(dim=1, keepdim=True).expand_as(e) if op in MIXES and e.dim() == 4 else size
        relative.append(((value.double() - e).abs() / (size + typical + 1e-300))[w])
    relative = torch.cat(relative)
    return torch.stack([relative.max(), relative.square().mean().sqrt()])


def assert_within_budget(op, got, same, exact, label):
    """Lists of one result over shapes: `got` against `exact`, judged by `same`, the reference in got's precision."""
    where = [s.isfinite() & e.isfinite() for s, e in zip(same, exact, strict=True)]
    for g, s, w in zip(got, same, where, strict=True):
        assert g.shape == s.shape and g.dtype == s.dtype, label
        assert g.isfinite()[w].all(), f"{label}: not finite where the reference is"
    if not any(w.any() for w in where):
        return
    ours, theirs = errors(op, got, exact, where), errors(op, same, exact, where)
    budget = 2 * theirs + 3 * torch.finfo(got[0].dtype).eps
    assert (ours <= budget).all(), f"{label}: errors (max, rms) {ours.tolist()}, the reference's {theirs.tolist()}"


def assert_doubles_within_budget(op, got, exact, single, exact_single, label):
    """In fp64 the reference is its own judge, so the yardstick is its fp32 error on such numbers, scaled to fp64."""
    where = [s.isfinite() & e.isfinite() for s, e in zip(single, exact_single, strict=True)]
    assert all(g.shape == e.shape and g.dtype == DOUBLE for g, e in zip(got, exact, strict=True)), label
    if not any(w.any() for w in where):
        return
    ours, theirs = errors(op, got, exact, where), errors(op, single, exact_single, where)
    ulp = torch.finfo(DOUBLE).eps
    # A fourth ulp: the yardstick's error depends on the processor that PyTorch's loops are compiled for.
    budget = 3 * theirs * ulp / torch.finfo(FLOAT).eps + 4 * ulp
    # Where exponentials round differently, a log-scale of up to 64 may be its neighbour, whose own exponential differs
    # by half the distance of doubles there. The reference has that error too.
    budget[0] += 16 * ulp if op in COUPLINGS else 0
    assert (ours <= budget).all(), f"{label}: errors (max, rms) {ours.tolist()}, budget {budget.tolist()}"


def compare(implementation, op, precision, spread, shapes):
    dtype, h_dtype = PRECISIONS[precision]
    single = cases(op, FLOAT, FLOAT, spread, shapes)
    for label, (many, same, exact) in cases(op, dtype, h_dtype, spread, shapes).items():
        got = [results(getattr(implementation, op), args) for args in many]
        for i in range(len(same[0])):
            mine, reference32, reference64 = ([r[i] for r in runs] for runs in (got, same, exact))
            for g, s in zip(mine, reference32, strict=True):
                assert g.stride() == s.stride() or 1 in s.shape, f"{op} {label} result {i}: strides"
            where = f"{op} {precision} {label} result {i}"
            if dtype == DOUBLE:
                yardstick = ([r[i] for r in runs] for runs in single[label][1:])
                assert_doubles_within_budget(op, mine, reference64, *yardstick, where)
            else:
                assert_within_budget(op, mine, reference32, reference64, where)
