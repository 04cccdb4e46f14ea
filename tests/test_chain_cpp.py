"""The native loop over a level's steps against the same ops called one by one from Python: equal to the bit."""

import itertools

import native_network
import pytest
import torch

from flowkern import backend as backends
from flowkern import chain, cpp

pytestmark = pytest.mark.usefixtures("wide_isa")
SETTINGS = list(itertools.product(("recompute", "store", "checkpoint"), (False, True)))
NETWORKS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def level(steps, scale, hidden=(9, 20, 12, 33), n=2, channels=6, size=(6, 5)):
    """A state, mixes and networks of `steps` steps whose hidden widths differ."""
    torch.manual_seed(0)
    outputs = channels // 2 if scale == "additive" else channels
    x = torch.randn(n, channels, *size).contiguous(memory_format=torch.channels_last)
    matrix = torch.eye(channels) + 0.1 * torch.randn(steps, channels, channels)
    parameters = []
    for width in hidden[:steps]:
        shapes = [(width, channels // 2, 3, 3), (width,), (width,), (width, width, 1, 1), (width,), (width,),
                  (outputs, width, 3, 3), (outputs,), (outputs,)]
        parameters += [0.2 * torch.randn(shape) for shape in shapes]
    parameters[0] = parameters[0].contiguous(memory_format=torch.channels_last)
    return x, (matrix, torch.randn(steps, channels), torch.linalg.inv(matrix)), parameters


def both(run, default, *arguments, **options):
    """What a native loop and the default make of the same."""
    return [f(*arguments, **options, table=native_network.table()) for f in (run, backends.default(default))]


def assert_same(mine, theirs):
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride() and torch.equal(a, b)


def flat(kept):
    return [t for position in kept for t in position]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["softclamp", "additive"])
@pytest.mark.parametrize("dtype", NETWORKS)
def test_equal_to_the_ops_one_by_one(dtype, scale, steps):
    dtype = NETWORKS[dtype]
    x, mixes, parameters = level(steps, scale)
    need = [i % 5 != 3 for i in range(len(parameters))]
    for (memory, reverse), anchors in itertools.product(SETTINGS, (0, 1, 2)):
        if anchors and memory != "recompute":
            continue
        options = {"parameters": parameters, "reverse": reverse, "scale": scale, "alpha": 0.8, "dtype": dtype,
                   "memory": memory}
        mine, theirs = both(cpp.chain, "chain", x, *mixes, anchor_every=anchors, **options)
        assert_same([mine[0], *flat(mine[2])], [theirs[0], *flat(theirs[2])])
        torch.testing.assert_close(mine[1], theirs[1])
        assert [len(k) for k in mine[2]] == chain._sizes(steps, memory, anchors)
        out, logdet, kept = mine
        boundary, cotangent = (out if memory == "recompute" else x), torch.randn_like(x)
        mine, theirs = (
            f(boundary, cotangent, logdet, [list(k) for k in kept], *mixes, need=need, **options,
              table=native_network.table())
            for f in (cpp.chain_vjp, backends.default("chain_vjp"))
        )
        assert_same([*mine[:3], *mine[3]], [*theirs[:3], *theirs[3]])
        if memory == "recompute":
            assert_same(mine[4:], theirs[4:])
            assert (mine[4] - x).abs().max() < 1e-2


PORTIONS = {
    "one thread": (1, 5, (6, 5)),
    "fewer images than threads": (3, 2, (40, 30)),
    "a rest": (3, 7, (40, 30)),
    "no rest": (2, 4, (36, 40)),
    "several at once": (5, 12, (4, 4)),
    "three ranges of sums a thread": (2, 17, (16, 16)),
    "a rest of more ranges": (2, 3, (64, 40)),
}


@pytest.mark.parametrize("case", PORTIONS)
@pytest.mark.parametrize("dtype", NETWORKS)
def test_recomputed_images_in_portions(dtype, case):
    """However threads divide a batch, states are the ones of the ops one by one, and sums over it up to rounding; the
    same bits again.
    """
    dtype, (count, images, size) = NETWORKS[dtype], PORTIONS[case]
    x, mixes, parameters = level(2, "softclamp", n=images, size=size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        for memory, reverse in [("recompute", False), ("recompute", True), ("checkpoint", False)]:
            options = {"parameters": parameters, "reverse": reverse, "scale": "softclamp", "alpha": 0.8, "dtype": dtype,
                       "memory": memory}
            out, logdet, kept = cpp.chain(x, *mixes, anchor_every=0, table=None, **options)
            given = (out if memory == "recompute" else x), torch.randn_like(x), logdet
            options["need"] = [True] * len(parameters)
            mine, again = (cpp.chain_vjp(*given, [list(k) for k in kept], *mixes, table=None, **options)
                           for _ in range(2))
            theirs = backends.default("chain_vjp")(*given, [list(k) for k in kept], *mixes, **options,
                                                   table=native_network.table())
            assert_same([*mine[:3], *mine[3]], [*again[:3], *again[3]])
            assert torch.equal(mine[0], theirs[0]) and (memory != "recompute" or torch.equal(mine[4], theirs[4]))
            for a, b in zip([*mine[1:3], *mine[3]], [*theirs[1:3], *theirs[3]], strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "images"), [(torch.float16, 2), (torch.float32, 0)])
def test_what_it_leaves_to_the_default(monkeypatch, dtype, images):
    """Other precisions and empty batches are not for the native loop."""
    x, mixes, parameters = level(2, "sigmoid")
    called = []
    monkeypatch.setitem(backends._defaults, "chain", lambda *arguments, **options: called.append(options["dtype"]))
    cpp.chain(x[:images], *mixes, parameters=parameters, dtype=dtype, reverse=False, scale="sigmoid", alpha=1.0,
              memory="store", anchor_every=0, table=None)
    assert called == [dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [0] * 7}, "a step keeps a state, h and two hidden activations"),
        ({"kept": [0, 0, 8, 0] * 2}, "either both hidden activations"),
        ({"kept": [0, 8, 0, 0, 0, 0, 0, 0]}, "every step's h"),
        ({"parameters": [8] * 17}, "nine parameters"),
        ({"strides": [1 << 30] * 24}, "fewer than 2\\^31 numbers"),
        ({"x": 0}, "null"),
        ({"settings": (0, 2, 6, 5, 7, 0, 1.0, False, False)}, "even number"),
        ({"settings": (0, 0, 6, 5, 6, 0, 1.0, False, False)}, "at least one step and one pixel"),
    ],
)
def test_the_binding_checks_what_it_is_given(change, message):
    given = {"settings": (0, 2, 6, 5, 6, 0, 1.0, False, False), "parameters": [8] * 18, "strides": [1] * 24, "x": 8,
             "kept": [0] * 8}
    given |= change
    with pytest.raises(ValueError, match=message):
        cpp._native().chain(1, given["settings"], [4, 4], given["parameters"], given["strides"], 8, 8, 8,
                            given["x"], given["kept"], 8, 8)


@pytest.mark.parametrize("where", ["mixes", "parameters"])
def test_tensors_on_different_devices_are_refused(where):
    """Native code reads memory by its address."""
    x, mixes, parameters = level(2, "softclamp")
    mixes = [m.to("meta") for m in mixes] if where == "mixes" else mixes
    parameters = [p.to("meta") for p in parameters] if where == "parameters" else parameters
    settings = {"reverse": False, "scale": "softclamp", "alpha": 1.0, "dtype": torch.float32, "table": None}
    with pytest.raises(ValueError, match="^chain: expected torch.float32 on cpu throughout, got torch.float32 on meta"):
        cpp.chain(x, *mixes, parameters=parameters, memory="recompute", anchor_every=0, **settings)
    with pytest.raises(ValueError, match="^chain_vjp: expected torch.float32 on cpu throughout, got .* on meta"):
        settings |= {"parameters": parameters, "need": [True] * len(parameters), "memory": "recompute"}
        cpp.chain_vjp(x, x, x.new_zeros(2), [[], []], *mixes, **settings)
