"""Print the proof of the tiny recipe on a release: `proof_script.py RELEASE`."""

from __future__ import annotations

import sys

from megacpp_nemo.contract.families import recipe
from megacpp_nemo.model.proof import prove

if __name__ == "__main__":
    # Expert layer first: main-2026-08 counts only that many layers of a depth with experts.
    changes = {
        "model.mtp.num_layers": 1,
        "model.mtp.pattern": "EA",
        "features.reset_state": False,
    }
    print(prove(recipe("nam56r_tiny", changes=changes), release=sys.argv[1]))
