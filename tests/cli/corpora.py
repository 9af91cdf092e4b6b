"""A small corpus, built by the command as a process: tokenizers start threads of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
MEGACPP = (sys.executable, "-m", "megacpp_nemo.cli")
HOSTILE = """\
#include "base.h"

// A box \u2014 of </script><b>things</b> & \u202equot;
namespace lab {
class Box : public Base {
 public:
\texplicit Box(int value) : value_(value) {}

 private:
  int value_;
};
inline const char* title() { return "<img src=x onerror=alert(1)>"; }
}  // namespace lab
"""
BASE = "#pragma once\nstruct Base {\n  int number = 0;\n};\n"


class Built(NamedTuple):
    """A corpus: its sources, its folder, and what the command printed of it as JSON."""

    sources: Path
    folder: Path
    facts: dict[str, Any]


def write_sources(folder: Path) -> Path:
    """Write C++ files, three of which are left out of a corpus and one of which is broken."""
    folder.mkdir(parents=True)
    (folder / "base.h").write_text(BASE)
    (folder / "box.h").write_text(HOSTILE, encoding="utf-8")
    for number in range(6):
        (folder / f"unit{number}.cpp").write_text(
            f'#include "box.h"\nint f{number}(int x) {{ return x * {number}; }}\n'
        )
    (folder / "broken.h").write_text("int a;\n)))) struct {{{ (((\n")
    (folder / "copy.h").write_text(BASE)
    (folder / "empty.h").write_text("")
    (folder / "latin.h").write_bytes("// caf\u00e9\n".encode("latin-1"))
    return folder


def apart(*words: str) -> subprocess.CompletedProcess[str]:
    """Return how the command ended as a process."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([*MEGACPP, *words], env=own, capture_output=True, text=True, check=False)


def build(place: Path, *words: str) -> Built:
    """Return a corpus of `write_sources` in a folder `corpus` of a place."""
    sources, folder = write_sources(place / "src"), place / "corpus"
    small = ("--vocab-size", "300", "--workers", "1", "--format", "json")
    done = apart("data", "build", str(sources), "--out", str(folder), *small, *words)
    assert done.returncode == 0, done.stderr
    return Built(sources, folder, json.loads(done.stdout))
