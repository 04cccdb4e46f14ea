"""Measurement operators against dense matrices and spatial convolutions, and what they refuse."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flowkern
from flowkern.operators import (
    OPERATORS,
    Blur,
    Compose,
    Downsample,
    Identity,
    Inpainting,
    Operator,
    RandomProjection,
    exact_consistency,
    from_config,
    gaussian_kernel,
)


class Halve:
    """A user's own operator: nothing but the two methods."""

    def forward(self, x):
        return x / 2

    adjoint = forward


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kernel(*shape):
    """Without symmetry, and of sum 1."""
    weights = random(*shape, seed=1) + 0.1
    return weights / weights.sum(dim=(-2, -1), keepdim=True)


def signed(*shape):
    """A kernel whose largest Fourier coefficient is not its sum."""
    weights = random(*shape, seed=2) - 0.5
    return weights + (1 - weights.sum()) / weights.numel()


def mask(*shape):
    return random(*shape, seed=3) < 0.6


# Each with the size (C, H, W) of its images; those with parameters of each image have three.
CASES = {
    "identity": (Identity, (2, 3, 4)),
    "mask": (lambda: Inpainting(mask(4, 5)), (2, 4, 5)),
    "mask of channels": (lambda: Inpainting(mask(2, 4, 5).int()), (2, 4, 5)),
    "mask of images": (lambda: Inpainting(mask(3, 1, 4, 5)), (2, 4, 5)),
    "mask of images, channels": (lambda: Inpainting(mask(3, 2, 4, 5).double()), (2, 4, 5)),
    "blur": (lambda: Blur(kernel(3, 3)), (2, 6, 5)),
    "blur, even": (lambda: Blur(kernel(4, 2)), (1, 5, 6)),
    "blur, as large as the image": (lambda: Blur(kernel(5, 4)), (1, 5, 4)),
    "blur, one row": (lambda: Blur(kernel(1, 3)), (1, 1, 7)),
    "blur, signed": (lambda: Blur(signed(3, 4)), (1, 6, 5)),
    "blur of images": (lambda: Blur(kernel(3, 3, 2)), (2, 5, 4)),
    "reflect": (lambda: Blur(kernel(3, 3), "reflect"), (2, 6, 5)),
    "reflect, even": (lambda: Blur(kernel(4, 2), "reflect"), (1, 5, 6)),
    "reflect, as large as the image": (lambda: Blur(kernel(5, 4), "reflect"), (1, 5, 4)),
    "reflect, one row": (lambda: Blur(kernel(1, 3), "reflect"), (1, 1, 7)),
    "reflect of images": (lambda: Blur(kernel(3, 2, 3), "reflect"), (1, 5, 4)),
    "box 1": (lambda: Downsample(1), (1, 3, 4)),
    "box 2": (lambda: Downsample(2), (2, 4, 6)),
    "box 3": (lambda: Downsample(3), (1, 9, 6)),
    "downsample": (lambda: Downsample(2, kernel(3, 4)), (1, 6, 8)),
    "downsample, to odd": (lambda: Downsample(2, signed(3, 3)), (1, 6, 10)),
    "downsample of images": (lambda: Downsample(3, kernel(3, 4, 5)), (1, 6, 9)),
    "downsample, reflect": (lambda: Downsample(2, kernel(4, 3), "reflect"), (1, 6, 8)),
    "projection": (lambda: RandomProjection((2, 4, 5), 0.4, seed=5), (2, 4, 5)),
    "projection, all": (lambda: RandomProjection((3, 3, 4), 1), (3, 3, 4)),
    "composition": (lambda: Compose(Downsample(2), Halve(), Inpainting(mask(6, 4)), Blur(kernel(3, 2))), (1, 6, 4)),
    "composition of images": (lambda: Compose(Blur(kernel(3, 3, 2), "reflect"), Inpainting(mask(6, 4))), (1, 6, 4)),
}
NO_INVERSE = {name for name in CASES if "reflect" in name or "composition" in name}
every_operator = pytest.mark.parametrize("name", CASES)
every_inverse = pytest.mark.parametrize("name", [name for name in CASES if name not in NO_INVERSE])


def make(name):
    """The operator in fp64, and three images for it."""
    build, size = CASES[name]
    return build().double(), random(3, *size, seed=4)


def dense(operator, size, n=3):
    """A as matrices (n, M, D), column by column."""
    basis = torch.eye(math.prod(size), dtype=torch.float64)
    columns = [operator.forward(e.reshape(1, *size).expand(n, *size)).flatten(1) for e in basis]
    return torch.stack(columns, dim=2)


@every_operator
def test_adjoint(name):
    operator, x = make(name)
    measured = operator.forward(x)
    y = random(*measured.shape, seed=6)
    ours = operator.adjoint(y)
    assert ours.shape == x.shape and ours.dtype == measured.dtype == torch.float64
    for a, b, c, d in zip(measured, y, x, ours, strict=True):  # image by image
        torch.testing.assert_close((a * b).sum(), (c * d).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator(x), measured, rtol=0, atol=0)


def spatial(x, kernels, padding):
    """Convolution as it is defined: F.conv2d correlates, so the kernel is flipped."""
    height, width = kernels.shape[-2:]
    margins = ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2)
    padded = F.pad(x, margins, mode=padding)
    kernels = kernels.expand(len(x), height, width).flip(-2, -1)
    return torch.cat([
        F.conv2d(image[:, None], k[None, None]).transpose(0, 1) for image, k in zip(padded, kernels, strict=True)
    ])


@pytest.mark.parametrize("padding", ["circular", "reflect"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 2), (4, 5), (5, 2), (7, 6), (3, 2, 3), (3, 3, 4)])
def test_blur_is_a_spatial_convolution(shape, padding):
    x, k = random(3, 2, 7, 6), kernel(*shape)
    expected = spatial(x, k, padding)
    torch.testing.assert_close(Blur(k, padding).forward(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Blur(k.float(), padding).forward(x.float()), expected.float(), rtol=1e-5, atol=1e-6)


def test_blur_at_the_left_edge_by_hand():
    x = torch.tensor([[[[1.0, 2, 3, 4]]]])
    k = torch.tensor([[0.5, 0.3, 0.2]])  # what is to the right of a pixel weighs 0.5
    assert Blur(k).forward(x)[0, 0, 0, 0].item() == pytest.approx(0.5 * 2 + 0.3 * 1 + 0.2 * 4)
    assert Blur(k, "reflect").forward(x)[0, 0, 0, 0].item() == pytest.approx(0.5 * 2 + 0.3 * 1 + 0.2 * 2)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_downsample_is_the_mean_of_blocks(factor):
    x = random(2, 3, 2 * factor, 3 * factor)
    for padding in ("circular", "reflect"):
        torch.testing.assert_close(Downsample(factor, padding=padding).double().forward(x), F.avg_pool2d(x, factor))


@pytest.mark.parametrize("padding", ["circular", "reflect"])
@pytest.mark.parametrize("factor", [2, 3])
def test_downsample_keeps_a_pixel_of_the_blurred_block(factor, padding):
    x, k = random(3, 2, 6, 12), kernel(3, 4, 3)
    first = (factor - 1) // 2
    expected = spatial(x, k, padding)[..., first::factor, first::factor]
    torch.testing.assert_close(Downsample(factor, k, padding).forward(x), expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_gaussian_of_the_factors_parity_is_centred_in_the_block(factor):
    x = random(1, 1, 12, 12)
    operator = Downsample(factor, gaussian_kernel(factor / 2, size=factor + 4)).double()
    turned = operator.forward(x.flip(-2, -1)).flip(-2, -1)
    torch.testing.assert_close(turned, operator.forward(x))


def test_gaussian_kernel():
    k = gaussian_kernel(1.5)
    assert k.shape == (11, 11) and k.dtype == torch.float32 and k.sum().item() == pytest.approx(1)
    assert k[5, 6].item() / k[5, 5].item() == pytest.approx(math.exp(-0.5 / 1.5**2))
    torch.testing.assert_close(k, k.T)
    even = gaussian_kernel(0.8, size=4)
    torch.testing.assert_close(even, even.flip(0, 1))
    assert gaussian_kernel(1e-3, size=3)[1, 1] == 1 and gaussian_kernel(1e-3, size=2).sum() == 1


def test_projection_is_orthonormal_hartley_of_random_signs():
    operator, size = RandomProjection((2, 3, 4), 0.5, seed=3), (2, 3, 4)
    a = dense(operator, size, n=1)[0]
    torch.testing.assert_close(a @ a.T, torch.eye(12, dtype=torch.float64))
    places = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float64) / s**0.5 for s in size))
    angles = 2 * math.pi * places @ places.T
    cas = (angles.cos() + angles.sin()) / math.sqrt(24)
    torch.testing.assert_close(a, cas[operator.indices] * operator.signs.flatten())
    assert operator.signs.unique().tolist() == [-1, 1] and len(operator.indices.unique()) == 12


def test_projection_follows_its_seed():
    global_state = torch.get_rng_state()
    one, same, other = (RandomProjection((3, 64, 64), 0.25, seed) for seed in (7, 7, 8))
    assert torch.equal(global_state, torch.get_rng_state())
    x = random(2, 3, 64, 64, dtype=torch.float32)
    assert torch.equal(one.forward(x), same.forward(x)) and one.forward(x).shape == (2, 3072)
    assert not torch.equal(one.signs, other.signs) and not torch.equal(one.indices, other.indices)
    # A different choice would be a different A under the same name: saved measurements would be worthless.
    assert one.indices[:5].tolist() == [1, 3, 4, 11, 13]
    assert one.signs.flatten()[:8].tolist() == [1, -1, 1, -1, 1, 1, 1, 1]
    assert sum(b.nbytes for b in one.buffers()) < 4 * x[0].nbytes
    assert RandomProjection((1, 2, 2), 0.01).forward(x[:, :1, :2, :2]).shape == (2, 1)


@every_operator
def test_norm(name):
    operator, x = make(name)
    size = tuple(x.shape[1:])
    expected = torch.linalg.matrix_norm(dense(operator, size), ord=2).max().item()
    got = operator.norm(size)
    assert isinstance(got, float)
    assert got == pytest.approx(expected, rel=1e-3 if name in NO_INVERSE else 1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "reflect" not in name] + ["reflect"])
def test_norm_without_a_size(name):
    operator, x = make(name)
    assert operator.norm() == pytest.approx(operator.norm(x.shape[1:]), rel=0.2)


def test_norm_depends_on_the_size_only_where_it_says_so():
    assert Blur(gaussian_kernel(2.0)).norm() == pytest.approx(1, rel=1e-6)
    assert Blur(gaussian_kernel(30.0)).norm() == pytest.approx(1, rel=1e-6)  # larger than 64 pixels
    assert Downsample(3).norm() == pytest.approx(1 / 3, rel=1e-6)
    assert Downsample(5, gaussian_kernel(12.0)).norm() <= 1 / 5 * (1 + 1e-6)
    sized = Compose(Inpainting(mask(6, 4)), Downsample(3))
    assert sized.size == (1, 18, 12) and sized.norm() <= 1 / 3 + 1e-6
    assert Compose(Blur(kernel(3, 3)), Downsample(3), Downsample(2)).size == (1, 384, 384)
    projection = RandomProjection((3, 6, 4), 0.5)
    assert Compose(projection, Inpainting(torch.ones(6, 4))).size == (3, 6, 4)
    assert Compose(Halve(), Halve()).norm() == pytest.approx(0.25)


@pytest.mark.parametrize("rho", [0.3, torch.tensor(0.3), torch.tensor([0.05, 1.0, 20.0])])
@every_inverse
def test_normal_inverse(name, rho):
    operator, x = make(name)
    b = random(*x.shape, seed=8)
    a = dense(operator, x.shape[1:])
    weights = torch.as_tensor(rho, dtype=torch.float64).expand(3)
    gram = a.mT @ a + weights[:, None, None] * torch.eye(a.shape[2], dtype=torch.float64)
    expected = torch.linalg.solve(gram, b.flatten(1))
    torch.testing.assert_close(operator.normal_inverse(b, rho).flatten(1), expected, rtol=1e-9, atol=1e-10)

    y = random(*operator.forward(x).shape, seed=9)
    right = (a.mT @ y.flatten(1)[..., None])[..., 0] + weights[:, None] * x.flatten(1)
    got = exact_consistency(operator, x, y, rho)
    torch.testing.assert_close(got.flatten(1), torch.linalg.solve(gram, right), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rho", [0.3, torch.tensor([0.05, 1.0, 20.0])])
def test_an_operator_s_own_prox_is_exact_consistency(rho):
    class Own:
        """Of every second pixel, with the minimiser written down."""

        def forward(self, x):
            return x[..., ::2]

        def adjoint(self, y):
            return torch.stack([y, torch.zeros_like(y)], dim=-1).flatten(-2)

        def prox(self, x, y, rho):
            return torch.stack([(y + rho * x[..., ::2]) / (1 + rho), x[..., 1::2]], dim=-1).flatten(-2)

    x, mask = random(3, 2, 4, 6, seed=3), (torch.arange(6) % 2 == 0).double().expand(4, 6)
    y = Own().forward(random(3, 2, 4, 6, seed=4))
    wanted = exact_consistency(Inpainting(mask), x, Own().adjoint(y), rho)
    torch.testing.assert_close(exact_consistency(Own(), x, y, rho), wanted)
    with pytest.raises(ValueError, match="rho must be a positive number"):
        exact_consistency(Own(), x, y, 0)


def test_exact_consistency_trusts_the_measurement_or_the_image():
    operator, x = make("mask")
    y = random(*x.shape, seed=9) * operator.mask
    torch.testing.assert_close(exact_consistency(operator, x, y, 1e-9), torch.where(operator.mask == 1, y, x))
    torch.testing.assert_close(exact_consistency(operator, x, y, 1e9), x)


@pytest.mark.parametrize("name", sorted(NO_INVERSE))
def test_no_inverse_no_attribute(name):
    operator, x = make(name)
    assert not hasattr(operator, "normal_inverse")
    with pytest.raises(TypeError, match="exact consistency needs an operator with normal_inverse or prox"):
        exact_consistency(operator, x, operator.forward(x), 1.0)


@every_operator
def test_gradients_in_images(name):
    operator, x = make(name)
    x.requires_grad_()
    y = operator.forward(x).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(operator.forward, x, fast_mode=True)
    assert torch.autograd.gradcheck(operator.adjoint, y, fast_mode=True)


@pytest.mark.parametrize("shape", [(), (3,)])
@every_inverse
def test_gradients_of_the_inverse(name, shape):
    operator, x = make(name)
    y = operator.forward(x).detach().clone().requires_grad_()
    inputs = (x.requires_grad_(), (random(*shape) + 0.5).requires_grad_())
    assert torch.autograd.gradcheck(operator.normal_inverse, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.normal_inverse, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, y, r: exact_consistency(operator, x, y, r), (inputs[0], y, inputs[1]),
                                    fast_mode=True)


@pytest.mark.parametrize("kind", [lambda k: Blur(k), lambda k: Blur(k, "reflect"), lambda k: Downsample(2, k)])
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 3)])
def test_gradients_in_kernels(kind, shape):
    x, k = random(3, 1, 6, 4), kernel(*shape).requires_grad_()

    def measured(k):
        operator = kind(k)
        inverse = operator.normal_inverse(x, 0.5) if hasattr(operator, "normal_inverse") else x
        y = operator.forward(x)
        return y, operator.adjoint(random(*y.shape)), inverse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # finite differences change the sum
        assert torch.autograd.gradcheck(measured, k)


def test_gradient_in_a_mask():
    weights = mask(3, 2, 4, 5).double().requires_grad_()
    x = random(3, 2, 4, 5)
    Inpainting(weights).forward(x).square().sum().backward()
    torch.testing.assert_close(weights.grad, 2 * weights.detach() * x.square())


def test_a_kernel_is_learnt_as_a_parameter():
    operator = Blur(nn.Parameter(kernel(3, 3)))
    assert [name for name, _ in operator.named_parameters()] == ["kernel"] and not list(operator.buffers())
    loaded = from_config(operator.config)
    assert isinstance(loaded.kernel, nn.Parameter)
    assert not list(Blur(kernel(3, 3)).parameters())


@every_operator
def test_saved_and_loaded_is_the_same(name):
    operator, x = make(name)
    if name == "composition":  # of which one is a user's own
        assert not hasattr(operator, "config")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = from_config(json.loads(json.dumps(operator.config))).double()
    flowkern.saving.fill(loaded, operator.state_dict(), "the weights")
    assert type(loaded) is type(operator) and loaded.config == operator.config
    assert torch.equal(loaded.forward(x), operator.forward(x))
    assert {t.dtype for t in loaded.state_dict().values()} <= {torch.float64, torch.int8, torch.int64}
    assert type(operator).__name__ in OPERATORS


@every_operator
def test_buffers_move(name):
    operator, x = make(name)
    moved = operator.to("meta")
    assert all(t.is_meta for t in [*moved.buffers(), *moved.parameters()])
    assert moved.forward(x.to("meta")).shape == make(name)[0].forward(x).shape
    assert moved.adjoint(moved.forward(x.to("meta"))).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_operator
def test_precisions(name, dtype):
    """The images decide, whatever the precision of the operator."""
    operator, x = make(name)
    expected, y = operator.forward(x), operator.forward(x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert y.dtype == dtype and operator.adjoint(y).dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    if name not in NO_INVERSE:
        inverse = operator.normal_inverse(x.to(dtype), torch.tensor(0.5))
        assert inverse.dtype == dtype
        torch.testing.assert_close(inverse.double(), operator.normal_inverse(x, 0.5), rtol=tolerance, atol=tolerance)
    assert operator.to(dtype).forward(x).dtype == torch.float64


@every_operator
def test_empty_batch_and_memory_order(name):
    operator, x = make(name)
    empty = operator.forward(x[:0])
    assert empty.shape == (0, *operator.forward(x).shape[1:])
    assert operator.adjoint(empty).shape == x[:0].shape
    if name not in NO_INVERSE:
        assert operator.normal_inverse(x[:0], torch.ones(0)).shape == x[:0].shape
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(operator.forward(last), operator.forward(x))


def test_compose_is_a_matrix_product():
    first, second = Blur(kernel(3, 3)), Inpainting(mask(6, 4))
    composed = Compose(second, first)
    product = dense(second, (1, 6, 4)) @ dense(first, (1, 6, 4))
    torch.testing.assert_close(dense(composed, (1, 6, 4)), product)
    assert not torch.allclose(dense(Compose(first, second), (1, 6, 4)), product)
    assert list(composed.state_dict()) == ["0.mask", "1.kernel"]
    nested = Compose(Downsample(2), composed, Halve())
    torch.testing.assert_close(nested.forward(random(3, 1, 6, 4)),
                               Downsample(2).forward(second.forward(first.forward(random(3, 1, 6, 4) / 2))))


@pytest.mark.parametrize("name", ["mask", "blur", "reflect", "downsample", "projection"])
def test_compiles_whole(name):
    operator, x = make(name)

    def both(x):
        y = operator.forward(x)
        return y, exact_consistency(operator, x, y, torch.tensor(0.5)) if name not in NO_INVERSE else x

    compiled = torch.compile(both, backend="eager", fullgraph=True, dynamic=False)
    for got, expected in zip(compiled(x), both(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_in_the_unfolded_network():
    """A gradient step of 1 / ||A||^2 never leaves the measurement further away."""
    operator, x = make("reflect of images")
    y = operator.forward(x)
    mu = operator.norm(x.shape[1:]) ** -2
    net = flowkern.Unfolded(nn.Identity(), folds=20, operator=operator, mu=mu, init="adjoint").double()
    before, after = (operator.forward(v) - y for v in (operator.adjoint(y), net(y)))
    assert after.norm() < 0.2 * before.norm()
    assert "operator.kernel" in net.state_dict()


def test_a_subclass_is_saved_once_it_is_registered(monkeypatch):
    class Negative(Operator):
        def forward(self, x):
            return -x

        adjoint = forward

    assert not hasattr(Negative(), "config")
    monkeypatch.setitem(OPERATORS, "Negative", Negative)
    assert isinstance(from_config(Negative().config), Negative) and Negative().norm() == pytest.approx(1)


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Inpainting([1]), TypeError, "mask must be a tensor, got list"),
        (lambda: Inpainting(torch.ones(3)), ValueError, r"mask must be \(H, W\), .* got \(3,\)"),
        (lambda: Inpainting(torch.ones(0, 3)), ValueError, r"not empty, got \(0, 3\)"),
        (lambda: Inpainting(torch.full((2, 2), 0.5)), ValueError, "mask must hold only zeros and ones"),
        (lambda: Inpainting(torch.zeros(2, 2)), ValueError, "mask measures nothing: it is all zeros$"),
        (lambda: Inpainting(torch.tensor([1, 0]).reshape(2, 1, 1, 1)), ValueError, "all zeros for some image"),
        (lambda: Inpainting(torch.ones(8, 9)).forward(X), ValueError, r"mask of size \(1, 8, 9\) does not fit .*8, 8"),
        (lambda: Inpainting(torch.ones(2, 8, 8)).adjoint(X), ValueError, r"mask of size \(2, 8, 8\) does not fit"),
        (lambda: Inpainting(torch.ones(3, 1, 8, 8)).forward(X), ValueError, "3 masks, one an image, and 2 images"),
        (lambda: Inpainting(torch.ones(8, 8)).forward(X[0]), ValueError, r"images \(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda: Inpainting(torch.ones(8, 8)).forward(X.int()), TypeError, "floating-point images .* got torch.int32"),
        (lambda: Inpainting(torch.ones(8, 8)).forward(1), TypeError, "got int"),
        (lambda: Blur("gauss"), TypeError, "kernel must be a floating-point tensor, got str"),
        (lambda: Blur(torch.ones(1, 1, dtype=int)), TypeError, "kernel must be .* got torch.int64"),
        (lambda: Blur(torch.ones(3)), ValueError, r"kernel must be \(kh, kw\) or \(N, kh, kw\), .* got \(3,\)"),
        (lambda: Blur(torch.ones(0, 3)), ValueError, r"not empty, got \(0, 3\)"),
        (lambda: Blur(torch.full((1, 1), math.nan)), ValueError, "kernel holds NaN or infinite values"),
        (lambda: Blur(gaussian_kernel(1.0), "same"), ValueError, "padding must be 'circular' or 'reflect', got 'same'"),
        (lambda: Blur(gaussian_kernel(2.0)).forward(X), ValueError, r"\(13, 13\) is larger than the images, \(8, 8\)"),
        (lambda: Blur(kernel(3, 2, 2)).forward(X), ValueError, "3 kernels, one an image, and 2 images"),
        (lambda: Blur(kernel(2, 2)).adjoint(X[0]), ValueError, r"Blur wants images \(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda: Blur(kernel(2, 2)).norm((8, 8)), ValueError, r"size must be three positive integers .* got \(8, 8\)"),
        (lambda: Blur(kernel(2, 2), "reflect").norm(8), ValueError, "size must be three positive integers .* got 8"),
        (lambda: gaussian_kernel(0), ValueError, "sigma must be a positive number, got 0"),
        (lambda: gaussian_kernel(1, size=2.5), ValueError, "size must be a positive integer, got 2.5"),
        (lambda: Downsample(0), ValueError, "factor must be a positive integer, got 0"),
        (lambda: Downsample(2.0), ValueError, "factor must be a positive integer, got 2.0"),
        (lambda: Downsample(3).forward(X), ValueError, r"factor 3 does not divide the images' size, \(8, 8\)"),
        (lambda: Downsample(3).normal_inverse(X, 1), ValueError, "factor 3 does not divide"),
        (lambda: Downsample(3).norm((1, 8, 8)), ValueError, "factor 3 does not divide"),
        (lambda: Downsample(2).adjoint(X[0]), ValueError, "Downsample wants images"),
        (lambda: RandomProjection((3, 8), 0.5), ValueError, r"size must be three positive integers .* got \(3, 8\)"),
        (lambda: RandomProjection((3, 8, 8), 0), ValueError, r"ratio must be a number in \(0, 1\], got 0"),
        (lambda: RandomProjection((3, 8, 8), 2), ValueError, "ratio must be .* got 2"),
        (lambda: RandomProjection((3, 8, 8), 0.5, seed=None), ValueError, "seed must be an integer, got None"),
        (lambda: RandomProjection((1, 8, 8), 0.5).forward(X), ValueError, r"size \(1, 8, 8\), got \(3, 8, 8\)"),
        (lambda: RandomProjection((1, 8, 8), 0.5).adjoint(X), ValueError, r"\(N, 32\), got \(2, 3, 8, 8\)"),
        (lambda: RandomProjection((1, 8, 8), 0.5).adjoint(X[0, 0].int()), TypeError, "measurements .* got torch.int32"),
        (lambda: Compose(), ValueError, "Compose wants at least one operator, got none"),
        (lambda: Compose(Identity(), 3), TypeError, "operators must have the methods forward and adjoint, got int"),
        (lambda: Identity().normal_inverse(X, 0), ValueError, "rho must be a positive number.* got 0"),
        (lambda: Identity().normal_inverse(X, True), ValueError, "rho must be a positive number.* got True"),
        (lambda: Identity().normal_inverse(X, torch.tensor([1.0, -1])), ValueError, "rho must be positive, got"),
        (lambda: Identity().normal_inverse(X, torch.tensor(math.nan)), ValueError, "rho must be positive, got"),
        (lambda: Identity().normal_inverse(X, torch.ones(3)), ValueError, r"each of the 2 images, got \(3,\)"),
        (lambda: exact_consistency(Halve(), X, X, 1), TypeError, "exact consistency .* not Halve"),
        (lambda: exact_consistency(Identity(), X, X, math.nan), ValueError, "rho must be a positive number.* got nan"),
        (lambda: from_config({"kind": "Radon"}), ValueError, "'kind' among Identity, .* got 'Radon'"),
        (lambda: from_config(["Blur"]), ValueError, r"got \['Blur'\]"),
        (lambda: from_config({"kind": "Blur"}), ValueError, "this is not the configuration of Blur: 'kernel'"),
        (lambda: from_config({"kind": "Identity", "x": 1}), ValueError, "this is not the configuration of Identity"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_kernel_that_changes_the_brightness_is_told():
    with pytest.warns(UserWarning, match="a kernel sums to 9, not to 1"):
        Blur(torch.ones(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Blur(gaussian_kernel(1.0).half())


def test_any_kernel_that_changes_the_brightness_is_told():
    kernel = gaussian_kernel(1.0)
    with pytest.warns(UserWarning, match="sums to 2,"):
        Blur(torch.stack([kernel, 2 * kernel]))


@pytest.mark.parametrize("rho", [torch.tensor(0.0), torch.tensor([1.0, 0.0])])
def test_a_rho_of_zero_is_refused_as_a_tensor_too(rho):
    for operator in (Identity(), Inpainting(torch.ones(4, 4)), RandomProjection((1, 4, 4), 0.5)):
        with pytest.raises(ValueError, match="rho must be positive"):
            operator.normal_inverse(torch.rand(2, 1, 4, 4), rho)


def test_an_operator_that_learns_and_is_there_twice_has_no_configuration():
    learns, fixed = Blur(nn.Parameter(gaussian_kernel(1.0))), Blur(gaussian_kernel(1.0))
    assert len(Compose(fixed, fixed, learns).config["operators"]) == 3
    with pytest.raises(ValueError, match="has an operator twice that learns"):
        Compose(learns, fixed, learns).config  # noqa: B018
