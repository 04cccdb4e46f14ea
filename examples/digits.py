"""A class-conditional Glow on scikit-learn's handwritten digits (8x8), trained for about a minute on a laptop.

    python examples/digits.py --picture digits.png

Writes a picture of samples, one row a class, and prints the bits per dimension of held-out digits, under their own
class and, as the comparison that tells whether the class is used, under a wrong one.
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import flowkern


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=None, help="end after so many steps")
    parser.add_argument("--picture", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None]      # 17 grey levels, 0 to 16
    classes = F.one_hot(torch.tensor(digits.target)[order], 10).float()
    (held, train), (held_classes, train_classes) = images.split([297, 1500]), classes.split([297, 1500])

    def dequantised(x):
        return (x + torch.rand_like(x)) / 17

    glow = flowkern.Glow((1, 8, 8), levels=2, depth=8, hidden=64, context_channels=10, shift=0.5)
    glow.initialize(dequantised(train), train_classes)
    adam = torch.optim.Adam(glow.parameters())
    began, step = time.monotonic(), 0
    while (used := (time.monotonic() - began) / options.seconds) < 1 and step != options.steps:
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1, step / 50) * (1 - used)
        batch = torch.randint(len(train), (64,))
        loss = -glow.log_prob(dequantised(train[batch]), train_classes[batch]).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(glow.parameters(), 100)
        adam.step()
        step += 1

    glow.eval()
    with torch.no_grad():
        x, other = dequantised(held), held_classes.roll(1, dims=1)
        own, wrong = ((glow.bits_per_dim(x, context=c, bits=0) + torch.tensor(17).log2()).mean().item()
                      for c in (held_classes, other))
    print(f"{step} steps; held-out bits/dim {own:.3f} under the digit's class, {wrong:.3f} under the next one")
    if options.picture:
        samples = glow.sample(100, temperature=0.7, context=torch.eye(10).repeat_interleave(10, dim=0))
        tiles = F.pad(samples.clamp(0, 1), (2, 2, 2, 2)).view(10, 10, 12, 12)
        grid = tiles.permute(0, 2, 1, 3).reshape(120, 120)
        plt.imsave(options.picture, grid.repeat_interleave(4, 0).repeat_interleave(4, 1), cmap="gray_r", vmin=0, vmax=1)
    return {"steps": step, "own": own, "wrong": wrong}


if __name__ == "__main__":
    main()
