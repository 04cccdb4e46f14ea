"""What users would pick instead: other PyTorch Glows that compute the same function, on copies of a Glow's weights."""

from bench.rivals.freia import FrEIA
from bench.rivals.memcnn import MemCNN
from bench.rivals.nflows import NFlows
from bench.rivals.normflows import NormFlows
from bench.rivals.plain import Compiled, CompiledWhole, Contiguous, Reference, Unfolded

__all__ = ["Compiled", "CompiledWhole", "Contiguous", "FrEIA", "MemCNN", "NFlows", "NormFlows", "Reference", "Unfolded"]
