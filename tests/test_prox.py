"""The networks that the paper's prox is compared with, and folds that share their weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import small_glow
from torch import nn

import flowkern


@pytest.mark.parametrize("memory", ["recompute", "store"])
def test_factors_of_lambda(memory):
    """A number, a tensor of one in any dtype, or one an image; what is none is refused before any work."""
    prox, x = flowkern.GlowProx(small_glow(memory=memory)), torch.rand(3, 2, 8, 8, dtype=torch.float64)
    wanted = torch.cat([prox(x[i : i + 1], scale) for i, scale in enumerate((0.5, 2, 0))])
    torch.testing.assert_close(prox(x, torch.tensor([0.5, 2, 0])), wanted)
    for scale in (2, torch.tensor(2), torch.tensor([2.0])):
        torch.testing.assert_close(prox(x, scale)[1:2], wanted[1:2])
    for scale, message in (
        (-1, "scale must be a number >= 0, .* got -1"),
        ("2", "scale must be a number >= 0, .* got '2'"),
        (torch.rand(4), r"scale must hold one number or one for each of the 3 images, got \(4,\)"),
        (torch.tensor([1, -1, 1]), "scale must be >= 0, got a tensor with a number that is not"),
    ):
        with pytest.raises(ValueError, match=message):
            prox(x, scale)


def randomise(module, seed=0):
    """Parameters and running statistics away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if "running_var" in name else 0.5 * noise - 0.2)
    return module


def norm(x, module):
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


def resnet(prox, x):
    """Mardani et al.: residual blocks, then three 1x1 convolutions, written out with the weights of `prox`."""
    for block in prox.blocks:
        inner = F.relu(norm(F.conv2d(x, block.first.weight, padding=1), block.norm1))
        inner = norm(F.conv2d(inner, block.second.weight, padding=1), block.norm2)
        skip = x if isinstance(block.skip, nn.Identity) else F.conv2d(x, block.skip.weight)
        x = F.relu(skip + inner)
    a, _, b, _, c = prox.head
    x = F.relu(F.conv2d(x, a.weight, a.bias))
    x = F.relu(F.conv2d(x, b.weight, b.bias))
    return F.conv2d(x, c.weight, c.bias)


def double(x, block):
    x = F.relu(norm(F.conv2d(x, block[0].weight, padding=1), block[1]))
    return F.relu(norm(F.conv2d(x, block[3].weight, padding=1), block[4]))


def unet(prox, x):
    """Ronneberger et al. with padding, for sizes divisible by 16."""
    skips = []
    for i, block in enumerate(prox.down):
        x = double(F.max_pool2d(x, 2) if i else x, block)
        skips.append(x)
    for i, (up, merge) in enumerate(zip(prox.up, prox.merge, strict=True)):
        x = double(torch.cat([skips[3 - i], F.conv_transpose2d(x, up.weight, up.bias, stride=2)], 1), merge)
    return F.conv2d(x, prox.head.weight, prox.head.bias)


@pytest.mark.parametrize(
    ("made", "literal"),
    [
        (flowkern.ResNetProx(3, features=6, blocks=3), resnet),
        (flowkern.ResNetProx(6, features=6, blocks=1), resnet),
        (flowkern.UNetProx(3, width=4), unet),
    ],
)
def test_they_are_the_published_networks(made, literal):
    prox = randomise(made.double()).eval()
    x = torch.rand(2, made.config["channels"], 32, 16, dtype=torch.float64)
    torch.testing.assert_close(prox(x), literal(prox, x))


def test_sizes_are_those_of_the_papers():
    unet, resnet = flowkern.UNetProx(3), flowkern.ResNetProx(3)
    assert [block[0].out_channels for block in unet.down] == [64, 128, 256, 512, 1024]
    assert sum(p.numel() for p in unet.parameters()) == 31_037_763  # the well-known 31 million
    assert [block.first.out_channels for block in resnet.blocks] == [128, 128]
    assert [layer.kernel_size for layer in resnet.head if isinstance(layer, nn.Conv2d)] == [(1, 1)] * 3


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 23)])
@pytest.mark.parametrize("make", [lambda: flowkern.ResNetProx(3, 4, 1), lambda: flowkern.UNetProx(3, 2)])
def test_any_size_and_gradients(make, size):
    torch.manual_seed(0)  # of so few features, all may be dead: one drawing in 750
    prox = make()
    x = torch.rand(2, 3, *size, requires_grad=True)
    out = prox(x)
    assert out.shape == x.shape
    found = torch.autograd.grad(out.square().sum(), [x, *prox.parameters()])
    assert all(g.isfinite().all() and g.any() for g in found)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: flowkern.UNetProx(3, width=4)(torch.rand(1, 3, 15, 16)), ValueError, "H and W at least 16, got"),
        (lambda: flowkern.UNetProx(3, width=4)(torch.rand(1, 1, 16, 16)), ValueError, r"\(N, 3, H, W\)"),
        (lambda: flowkern.ResNetProx(3, features=4)(torch.rand(3, 16, 16)), ValueError, r"\(N, 3, H, W\)"),
        (lambda: flowkern.ResNetProx(3, features=0), ValueError, "features wants an int >= 1, got 0"),
        (lambda: flowkern.ResNetProx(3, blocks=1.5), TypeError, "blocks wants an int, got 1.5"),
        (lambda: flowkern.UNetProx(True), TypeError, "channels wants an int, got True"),
    ],
)
def test_bad_arguments_and_inputs(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def proxes():
    torch.manual_seed(0)
    glow = small_glow((3, 16, 16), dtype=torch.float32)
    return [
        flowkern.GlowProx(glow, lam=0.3),
        randomise(flowkern.ResNetProx(3, features=4, blocks=1)),
        randomise(flowkern.UNetProx(3, width=2)),
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prox", proxes(), ids=lambda prox: type(prox).__name__)
def test_saved_and_loaded_is_bitwise_the_same(prox, tied, tmp_path):
    net = flowkern.Unfolded(prox, folds=3, tied=tied)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.add_(0.01 * (i % 3))
    net.train()(torch.rand(4, 3, 16, 16))  # running statistics that differ between folds
    net.save_pretrained(tmp_path)
    loaded = flowkern.Unfolded.from_pretrained(tmp_path)
    y = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(y), net.eval()(y))
    assert loaded.tied == tied and len(list(loaded.parameters())) == len(list(net.parameters()))


@pytest.mark.parametrize("prox", proxes(), ids=lambda prox: type(prox).__name__)
def test_tied_folds_share_all_but_what_is_a_fold_s_own(prox):
    before = copy.deepcopy(prox.state_dict())
    net = flowkern.Unfolded(prox, folds=3, tied=True)
    own = [n for n, m in prox.named_modules() if isinstance(m, nn.BatchNorm2d)]
    own = {name for name, _ in prox.named_parameters() if name == "raw_lam" or name.rsplit(".", 1)[0] in own}
    assert bool(own)
    folds = [dict(fold.named_parameters()) for fold in net.proxes]
    for name in before.keys() & folds[0].keys():
        assert (folds[0][name] is folds[2][name]) == (name not in own)
    net.train()(torch.rand(2, 3, 16, 16)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert all(torch.equal(before[name], value) for name, value in prox.state_dict().items())
    statistics = [[b for n, b in fold.named_buffers() if "running_mean" in n] for fold in net.proxes]
    assert all(not torch.equal(a, b) for a, b in zip(statistics[0], statistics[1], strict=True))


@pytest.mark.parametrize("prox", proxes(), ids=lambda prox: type(prox).__name__)
def test_gradients_of_tied_folds_are_the_sum_over_untied_ones(prox):
    prox = prox.double()
    tied, untied = (flowkern.Unfolded(prox, folds=2, tied=tied).double().train() for tied in (True, False))
    y = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for net in (tied, untied):
        net(y).square().sum().backward()
    shared = dict(tied.proxes[0].named_parameters())
    copies = [dict(fold.named_parameters()) for fold in untied.proxes]
    for name, parameter in shared.items():
        fold1, fold2 = (c[name].grad for c in copies)
        is_shared = parameter is dict(tied.proxes[1].named_parameters())[name]
        torch.testing.assert_close(parameter.grad, fold1 + fold2 if is_shared else fold1, rtol=1e-6, atol=1e-9)


def test_batch_norm_is_updated_once_a_fold_and_step():
    net = flowkern.Unfolded(flowkern.ResNetProx(3, features=4, blocks=1), folds=2).train()
    for _ in range(3):
        net(torch.rand(2, 3, 8, 8)).sum().backward()
    counts = [int(b) for n, b in net.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts == [3] * 4


def test_sequences_are_not_tied():
    prox = flowkern.ResNetProx(3, features=4, blocks=1)
    with pytest.raises(ValueError, match="tied=True shares the weights of a single prox; got a sequence"):
        flowkern.Unfolded([prox, prox], folds=2, tied=True)


def test_options_of_a_flow_are_refused_by_others(tmp_path):
    flowkern.Unfolded(flowkern.ResNetProx(3, features=4, blocks=1), folds=2).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="ResNetProx has no options, got 'memory'"):
        flowkern.Unfolded.from_pretrained(tmp_path, memory="store")
