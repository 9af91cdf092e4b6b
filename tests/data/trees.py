"""Made-up C++ sources on disk."""

from __future__ import annotations

import random
from pathlib import Path


def cpp_text(seed: int, lines: int = 40) -> str:
    """Return made-up C++ that differs from every other seed's."""
    rng = random.Random(seed)
    words = ["tensor", "stride", "kernel", "buffer", "offset", "index", "scale", "bias"]
    body = [
        f"  auto {rng.choice(words)}{rng.randrange(50)} = {rng.choice(words)}({rng.randrange(99)});"
        for _ in range(lines)
    ]
    return f"// file {seed}\nint function_{seed}() {{\n" + "\n".join(body) + "\n  return 0;\n}\n"


def write_tree(root: Path, files: int = 24, lines: int = 40) -> Path:
    """Write `files` distinct sources under `root`, some in folders."""
    for number in range(files):
        path = root / f"part{number % 3}" / f"unit{number:03d}.cpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cpp_text(number, lines), encoding="utf-8")
    return root
