"""Batch norm over all processes, also where PyTorch's own has no kernel for it: on the CPU."""

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn


class AcrossProcesses(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches of all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(x)
        kind, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast it may be less
        count = x.numel() // x.shape[1] * dist.get_world_size()  # every process has an equal part of a batch
        mean = total(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = total(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            new = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, new)
            self.running_var.lerp_(variance * count / (count - 1), new)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(kind)


class _Total(torch.autograd.Function):
    """The sum over all processes. Every process's loss depends on it, so its gradient is a sum over them, too."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole)
        return whole


total = _Total.apply


class SyncAnywhere(LayerSync):
    """Lightning's switch: PyTorch's SyncBatchNorm on GPUs, `AcrossProcesses` elsewhere."""

    def apply(self, model: nn.Module) -> nn.Module:
        if torch.cuda.is_available():
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return _swap(model, nn.BatchNorm2d, AcrossProcesses)

    def revert(self, model: nn.Module) -> nn.Module:
        return _swap(model, (nn.SyncBatchNorm, AcrossProcesses), nn.BatchNorm2d)


def _swap(model: nn.Module, old: type | tuple[type, ...], new: type) -> nn.Module:
    """Exchange the class of all batch norms; parameters, buffers and settings are the same in all of them."""
    for name, child in model.named_children():
        if isinstance(child, old):
            swapped = new(child.num_features, child.eps, child.momentum)
            swapped.__dict__.update(child.__dict__)
            setattr(model, name, swapped)
        else:
            _swap(child, old, new)
    return model
