"""Print the proof of the tiny recipe on a release: `proof_script.py RELEASE`."""

from __future__ import annotations

import sys

from megacpp_nemo.contract.families import recipe
from megacpp_nemo.model.proof import prove

if __name__ == "__main__":
    changes = {"model.mtp.num_layers": 1, "features.reset_state": False}
    print(prove(recipe("nam56r_tiny", changes=changes), release=sys.argv[1]))
