"""Define, check, launch and train hybrid language models on NVIDIA's stack.

Importing this package imports nothing heavy: `megacpp_nemo.contract` needs the standard
library alone, and torch, Megatron-Core and NeMo are imported by the modules that use them.
"""

__version__ = "0.1.0"
