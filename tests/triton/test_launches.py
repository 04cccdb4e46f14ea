"""How many kernels a step of flow launches beside its coupling network: fused ones of ours, and nothing else."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from flowkern import backend as backends
from flowkern import chain

pytestmark = pytest.mark.unpoisoned
LAUNCH_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "slice", "select", "view", "_unsafe_view",
                  "alias", "detach", "permute", "as_strided", "transpose", "_reshape_alias", "expand", "unbind"}
CPU = torch.device("cpu")


class Launches(TorchDispatchMode):
    """Counts PyTorch's kernels by name, and with `monkeypatch` Triton's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        run = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            name = executor.fn.__name__
            self.counts[name] += 1
            before = Counter(self.counts)
            result = run(executor, *args, **kwargs)
            self.counts = before     # what the interpreter itself calls does not count
            return result

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in LAUNCH_NOTHING:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class NoNetwork:
    """Networks that launch nothing: every one gives the same (raw, t), and has no parameters."""

    def __init__(self, h):
        self.h = h

    def trace(self, k, a):
        return self.h, []

    def forward(self, k, a):
        return self.h

    def vjp(self, k, a, hidden, dh, need, da):
        return []

    def count(self, k):
        return 0


def launches(steps, channels, monkeypatch, reverse):
    """What forward and backward of a chain launch."""
    table = backends.table(CPU, "triton")
    x, g = (torch.randn(2, channels, 3, 2).contiguous(memory_format=torch.channels_last) for _ in range(2))
    nets = NoNetwork(torch.randn(2, channels, 3, 2).contiguous(memory_format=torch.channels_last))
    matrix, offset = torch.eye(channels).repeat(steps, 1, 1), torch.zeros(steps, channels)
    settings = (reverse, "softclamp", 1.0, table, "recompute")
    found = []
    with Launches(monkeypatch) as forward:
        out, logdet, kept = chain._run(x, matrix, offset, matrix, nets, *settings, 0)
        found.append(forward.counts)
    with Launches(monkeypatch) as backward:
        chain._vjp(None, out, g, logdet, kept, matrix, offset, matrix, nets, [], *settings)
        found.append(backward.counts)
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channels", [4, 72])
def test_one_fused_kernel_a_step_forward_and_few_backward(channels, reverse, monkeypatch):
    with monkeypatch.context() as patch:
        few = launches(3, channels, patch, reverse)
    with monkeypatch.context() as patch:
        many = launches(5, channels, patch, reverse)
    forward, backward = (more - fewer for more, fewer in zip(many, few, strict=True))
    assert forward == Counter({"_couple_mix_kernel": 2})
    assert backward["_couple_vjp_kernel"] == 2 and backward["_total_kernel"] == 2
    mixes = {"_fused_kernel": 2} if channels <= 64 else {"_mix_kernel": 4, "_outer_kernel": 2}
    assert backward == Counter({"_couple_vjp_kernel": 2, "_total_kernel": 2, **mixes})
    # What does not grow with the number of steps: the first mix and the sum of the log-determinants.
    assert sum(few[0].values()) <= 3 + 4 and sum(few[1].values()) <= 3 * sum(mixes.values()) / 2 + 6


def test_composition_of_all_steps_is_one_launch_each_way(monkeypatch):
    table = backends.table(CPU, "triton")
    square, line = torch.eye(4).repeat(7, 1, 1), torch.zeros(7, 4)
    permutation = torch.arange(4).repeat(7, 1)
    fixed, dlogdet = (torch.ones(7, 4), permutation), torch.ones(())
    with Launches(monkeypatch) as seen:
        table.compose(square, square, line, line, line, *fixed)
        table.compose_vjp(square, square, line, line, line, *fixed, square, line, dlogdet)
    assert seen.counts == Counter({"_compose_kernel": 1, "_compose_vjp_kernel": 1})


def test_the_count_sees_what_pytorch_launches(monkeypatch):
    with Launches(monkeypatch) as seen:
        torch.ones(2)[1:].add_(1).exp()
    assert seen.counts == Counter({"ones": 1, "add_": 1, "exp": 1})
