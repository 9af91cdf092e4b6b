"""The `megacpp` command: lowering, lifting, seams and releases from a shell.

    megacpp lower nam56r precision=fp8 --release 0.19.0

It needs the standard library and the ground storey alone, so it starts at once and runs where
neither torch nor NeMo is installed. Exit status: 0 done, 2 wrong usage, 3 refused.
"""

from megacpp_nemo.cli.start import main

__all__ = ["main"]
