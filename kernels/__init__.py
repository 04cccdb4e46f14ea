"""Triton kernels: the ops of `flowkern.reference` on a GPU. `flowkern.triton` registers them as a backend."""
