"""What is done with a model and measured: for each, its inputs, the call, and the result whose error is told."""

import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.workload import Setup

TEMPERATURE = 0.7
SEED = 3


@dataclass(frozen=True)
class Work:
    """inputs(model, setup) -> the arguments of `run(model, *arguments)`, and of `result`, which gives tensors by name
    to be compared with those of a model in double precision. trains: with a backward pass, so that a contender's
    `evaluations` count. forward(model, *arguments) -> a scalar: the part of `run` before its backward.
    draws: of inputs that differ in their last bits, over which an error is the median. One input tells little where a
    ReLU's sign, which rounding decides, moves a gradient by more than all other rounding.
    """

    inputs: Callable[[Callable, Setup], tuple]
    run: Callable
    result: Callable
    flops: Callable[[Setup], int]       # of the coupling networks, one evaluation each
    what: str
    forward: Callable | None = None
    draws: int = 1

    @property
    def trains(self) -> bool:
        return self.forward is not None


def gradient(model: nn.Module, *arguments, forward: Callable) -> dict[str, Tensor]:
    """The gradient of a scalar with respect to the model's parameters and the arguments that want one, in double
    precision: a vector for each kind of parameter of a level, over its steps and over folds.
    """
    _backward(model, *arguments, forward=forward)
    named = model.flat_parameters() if hasattr(model, "flat_parameters") else model.named_parameters()
    found: dict[str, list[Tensor]] = {}
    for name, p in (*named, *(("argument", x) for x in _with_gradient(arguments))):
        if p.grad is not None:
            found.setdefault(_kind(name), []).append(p.grad.double().flatten())
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def _kind(name: str) -> str:
    """Of a parameter: its level, and its own name with that of its ActNorm."""
    level, own = re.search(r"\blevels\.\d+", name), name.split(".")
    parts = own[-2:] if own[-1] in ("log_scale", "bias") and len(own) > 1 else own[-1:]
    return ".".join([*([level[0]] if level else []), *parts])


def _backward(model: nn.Module, *arguments, forward: Callable) -> None:
    model.zero_grad(set_to_none=True)
    for x in _with_gradient(arguments):
        x.grad = None
    forward(model, *arguments).backward()


def _with_gradient(arguments: tuple) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]


def _training(forward: Callable, inputs: Callable, flops: Callable, what: str, draws: int = 1) -> Work:
    def run(model, *arguments):
        _backward(model, *arguments, forward=forward)

    return Work(inputs, run, lambda model, *a: gradient(model, *a, forward=forward), flops, what, forward, draws)


def _inference(run: Callable, inputs: Callable, what: str) -> Work:
    return Work(inputs, run, lambda model, *a: {"result": run(model, *a)}, lambda setup: setup.flops(), what)


def _images(model: nn.Module, setup: Setup) -> tuple[Tensor]:
    return (setup.images(),)


@torch.no_grad()
def _latents(model: nn.Module, setup: Setup) -> tuple:
    return (model(setup.images())[0],)


@torch.no_grad()
def _noise(model: nn.Module, setup: Setup) -> tuple:
    """The arguments of `_sample`: shapes of the latent's parts, taken from the model."""
    z = model(setup.images())[0]
    return ([tuple(part.shape) for part in z] if isinstance(z, list) else tuple(z.shape),)


@torch.no_grad()
def _sample(model: nn.Module, shapes) -> Tensor:
    """Latents from N(0, T^2 I), and their images: what `flowkern.Glow.sample` does, and its own where it has it."""
    torch.manual_seed(SEED)
    if hasattr(model, "sample"):
        return model.sample(shapes[0], temperature=TEMPERATURE)
    dtype = next(model.parameters()).dtype

    def draw(shape):
        # In single precision always, so that the model in double precision gets the same.
        return TEMPERATURE * torch.randn(shape, dtype=torch.float32).to(dtype)

    return model.inverse([draw(shape) for shape in shapes] if isinstance(shapes, list) else draw(shapes))


@torch.no_grad()
def _log_prob(model: nn.Module, x: Tensor) -> Tensor:
    return model.log_prob(x)


@torch.no_grad()
def _inverse(model: nn.Module, z) -> Tensor:
    return model.inverse(z)


def _state(model: nn.Module, setup: Setup) -> tuple[Tensor]:
    """The input of the last level's first step, as a state that wants a gradient."""
    channels, side = setup.channels()[-1], setup.size >> setup.levels
    torch.manual_seed(SEED)
    x = torch.randn(setup.batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    return (x.requires_grad_(),)


def _step_loss(model: nn.Module, x: Tensor) -> Tensor:
    y, logdet = model(x)
    return 0.5 * y.square().sum() / len(y) - logdet.mean()


def _noisy(model: nn.Module, setup: Setup) -> tuple[Tensor, Tensor]:
    return setup.noisy_images(), setup.images()


def _one_step_flops(setup: Setup) -> int:
    p, c = setup.pixels()[-1], setup.channels()[-1]
    return setup.evaluation_flops(c, p)


def _denoising_flops(setup: Setup) -> int:
    """A fold runs every network forwards and in reverse; the start is one image's inverse."""
    return setup.flops() * 2 * setup.folds + setup.flops() // setup.batch


WORKS = {
    "train": _training(lambda model, x: -model.log_prob(x).mean(), _images, lambda setup: setup.flops(),
                       "Training step: forward, negative log-likelihood, backward"),
    "log_prob": _inference(_log_prob, _images, "Likelihood without gradients"),
    "inverse": _inference(_inverse, _latents, "Inverse without gradients"),
    "sample": _inference(_sample, _noise, f"Samples at temperature {TEMPERATURE}"),
    "step": _training(_step_loss, _state, _one_step_flops, "One step of flow, forward and backward"),
    "denoise": _training(lambda model, y, x: F.mse_loss(model(y), x), _noisy, _denoising_flops,
                         "Training step of the unfolded denoiser", draws=5),
}


def converted(value, dtype: torch.dtype):
    """Floating-point tensors in another precision, inside a list too; whether they want gradients stays as it is."""
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return [converted(v, dtype) for v in value]
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _rounding(exactly: nn.Module) -> Callable:
    """A model in double precision, from and to single precision."""

    def call(x: Tensor):
        z, logdet = exactly(x.double())
        return converted(z, torch.float32), logdet.float()

    return call


class Errors:
    """|r - r64| / |r64| of works' results, r64 by a model in double precision on the same inputs; the median over a
    work's draws of inputs. By name of the parts, and "all" of them together.

    What that model gives is kept: the contenders that are compared with it share it.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._models: dict = {}
        self._exact: dict = {}

    def __call__(self, name: str, model: nn.Module, truth: Callable[[Setup], nn.Module]) -> dict[str, float]:
        work = WORKS[name]
        if truth not in self._models:
            self._models[truth] = truth(self._setup).double()
        if (truth, name) not in self._exact:
            self._exact[truth, name] = list(_exact(work, self._models[truth], self._setup))
        draws = [_relative(work.result(model, *arguments), result) for arguments, result in self._exact[truth, name]]
        return {part: statistics.median(draw[part] for draw in draws) for part in draws[0]}


def _relative(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors by part. Raises ValueError where the parts are not the same."""
    if found.keys() != exact.keys():
        raise ValueError(f"results of {', '.join(found)} can't be compared with {', '.join(exact)}")
    wrong = {part: (found[part].double() - e).norm().item() for part, e in exact.items()}
    right = {part: e.norm().item() for part, e in exact.items()}
    errors = {part: w / right[part] if right[part] else math.inf if w else 0.0 for part, w in wrong.items()}
    return {"all": math.hypot(*wrong.values()) / math.hypot(*right.values()), **errors}


def _exact(work: Work, exactly: nn.Module, setup: Setup) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """The arguments of a work's draws, and their results."""
    # Latents are of the exact model, rounded, so that both start from the same numbers.
    given = work.inputs(_rounding(exactly), setup)
    generator = torch.Generator().manual_seed(SEED)
    for draw in range(work.draws):
        arguments = tuple(_nearby(a, generator) for a in given) if draw else given
        yield arguments, work.result(exactly, *(converted(a, torch.float64) for a in arguments))


def _nearby(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with about its last bits changed."""
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator))
