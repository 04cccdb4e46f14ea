"""The log-likelihoods of other Glow implementations, computed with plain tensor operations from their descriptions.

Each module has `weights(...)`, random tensors under that implementation's names, far from their initialisation, and
`log_prob(weights, x, ...)`, which reads nothing but those. None of it shares code with flowkern.
"""
