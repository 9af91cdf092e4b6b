"""Train nam56r_tiny on any folder of C++ sources, in this process.

    python examples/own_sources.py /src/project
    python examples/own_sources.py /src/project --steps 60 --log-dir runs/project

A tokenizer is trained on the folder first, and one file in twenty is held back to validate on.
Starting it again with the same --log-dir resumes from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys

import nemo_run as run

from megacpp_nemo.contract import MegaCppError
from megacpp_nemo.recipes import cpp_folder, nam56r_tiny, use_data


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="folder of C++ sources")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--log-dir", default="runs/own_sources", help="folder of the run")
    given = parser.parse_args()
    try:
        recipe = nam56r_tiny(train_steps=given.steps, log_dir=given.log_dir)
        use_data(recipe, cpp_folder(root=given.folder))
        run.run(recipe, direct=True)
    except MegaCppError as error:
        sys.exit(f"own_sources: {error}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
