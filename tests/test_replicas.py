"""nn.DataParallel's replicas, whose parameters can't be listed, and shards of fully_shard, which are not what a call
uses: what needs them says so instead of losing gradients.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flowkern
from flowkern import ReversibleSequence
from flowkern.layers import StepOfFlow
from flowkern.operators import Blur, gaussian_kernel

X = torch.rand(2, 3, 8, 8)


def glow(**options):
    made = flowkern.Glow((3, 8, 8), levels=1, depth=2, hidden=4, **options)
    made.initialize(X)
    return made


def replica(net: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it on a GPU, parameters plain tensors with a graph to the original's."""
    made = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, copy in made.items():
        for name, child in module._modules.items():
            setattr(copy, name, made[child])
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter * 1)
    return made[net]


@pytest.mark.parametrize(
    ("net", "run", "who"),
    [
        (glow(), lambda net: net.log_prob(X), "Glow"),
        (glow(), lambda net: net.inverse(X.flatten(1)), "Glow"),
        (glow(), lambda net: net.sample(2), "Glow"),
        (glow(network=lambda a, b: nn.Conv2d(a, b, 1)), lambda net: net(X), "Glow"),
        (flowkern.Unfolded(flowkern.GlowProx(glow()), folds=2), lambda net: net(X), "Glow"),
        (flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2, kept_images=1), lambda net: net(X), "ResNetProx"),
        (ReversibleSequence([StepOfFlow(4, hidden=4)]), lambda net: net(torch.rand(2, 4, 4, 4)), "ReversibleSequence"),
        (StepOfFlow(4, network=lambda a, b: nn.Conv2d(a, b, 1)), lambda net: net(torch.rand(2, 4, 4, 4)), "Conv2d"),
    ],
)
def test_replicas_are_refused(net, run, who):
    with pytest.raises(RuntimeError, match=f"^{who} does not run under nn.DataParallel.*DistributedDataParallel$"):
        run(replica(net))


LEARNT = Blur(nn.Parameter(gaussian_kernel(1.0, 3)))


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2), X),
        (flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2, operator=LEARNT), X),
        (ReversibleSequence([StepOfFlow(3 * 4, hidden=4)], memory="store"), X.reshape(2, 12, 4, 4)),
    ],
)
def test_what_needs_no_list_of_parameters_runs_and_has_its_gradients(net, x):
    def gradients(run):
        net.zero_grad()
        out = run(x)
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    net.eval()
    wanted = gradients(net)
    torch.testing.assert_close(gradients(replica(net)), wanted)
    assert any(g.abs().sum() > 0 for g in wanted)


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parts_that_are_sharded_by_themselves_are_refused(alone):
    own, steps = glow(network=lambda a, b: nn.Conv2d(a, b, 1)), [StepOfFlow(4, hidden=4) for _ in range(2)]
    standard, sequence = glow(), ReversibleSequence(steps, memory="checkpoint")
    unfolded = flowkern.Unfolded(flowkern.ResNetProx(3, 4), folds=2, kept_images=1)
    nets = [net.levels[0].steps[0].coupling.net for net in (own, standard)]
    for part in (*nets, steps[1], unfolded.proxes[0]):
        fully_shard(part, mesh=alone)
    for net, x, name in [(own, X, "FSDPConv2d"), (standard, X, "FSDPCouplingNet"), (unfolded, X, "FSDPResNetProx"),
                         (sequence, torch.rand(2, 4, 4, 4), "ReversibleSequence")]:
        with pytest.raises(RuntimeError, match=f"^a {name} that is sharded by itself would lose its gradients"):
            net(x)


def test_a_whole_model_may_be_sharded(alone):
    wanted, sharded = glow(), glow()
    sharded.load_state_dict(wanted.state_dict())
    fully_shard(sharded, mesh=alone)
    for net in (wanted, sharded):
        sum(t.square().sum() for t in net(X)).backward()
    for p, q in zip(sharded.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
