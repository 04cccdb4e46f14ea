"""A variational autoencoder of scikit-learn's digits whose prior is a Glow over its latents (4 channels of 4x4).

    python examples/vae.py --steps 2000
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import flowkern
from flowkern.distributions import GlowDistribution


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 8, 3, padding=1))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 1, 3, padding=1))
        self.glow = flowkern.Glow((4, 4, 4), levels=1, depth=6, hidden=32)

    def posterior(self, x):
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        return Independent(Normal(mean, log_std.exp()), 3)

    def elbo(self, x):
        """(N,) in nats: how well the latents explain x, less the divergence of the posterior from the Glow."""
        posterior = self.posterior(x)
        z = posterior.rsample()
        likelihood = Independent(Bernoulli(logits=self.decoder(z), validate_args=False), 3).log_prob(x)
        return likelihood + GlowDistribution(self.glow).log_prob(z) - posterior.log_prob(z)

    def sample(self, n):
        return torch.sigmoid(self.decoder(self.glow.sample(n, temperature=1.0)))


def main(steps=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = steps or parser.parse_args().steps
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    model = VAE()
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        loss = -model.elbo(images[torch.randint(len(images), (64,))]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step}: -elbo {loss.item():.2f} nats")
    return model.eval(), loss.item(), F.mse_loss(model.sample(200).mean(0), images.mean(0)).item()


if __name__ == "__main__":
    main()
