"""Where these tests run."""

import os

import torch

DEVICE = torch.device(os.environ.get("FLOWKERN_TEST_DEVICE", "cuda"))
