"""Where executors and profiles stand: a folder of one's own first, then this package's.

A word names the file `WORD.yaml` in `executors/` or `profiles/` of those folders. A word with a
slash, or that ends in `.yaml` or `.yml`, is the path of a file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megacpp_nemo.contract.errors import nearest
from megacpp_nemo.launch.errors import LaunchError

CONFIGS = "megacpp_nemo.configs"
ENDINGS = (".yaml", ".yml")


def shipped() -> Path:
    """Return the folder of this package's own files.

    Raises:
        LaunchError: If the installation lacks it.
    """
    found = importlib.util.find_spec(CONFIGS)
    if found is None or found.origin is None:
        raise LaunchError(
            "The executors and profiles of megacpp_nemo are not installed",
            given=f"no package {CONFIGS}",
            allowed="a whole installation",
            hint="pip install again; an editable one too",
        )
    return Path(found.origin).parent


def names(kind: str, own: Path | None = None) -> dict[str, Path]:
    """Return the file of each name of a kind, `executors` or `profiles`, by name.

    Args:
        kind: The folder.
        own: A folder of one's own with such folders; its files win over ours.
    """
    found: dict[str, Path] = {}
    for base in (shipped(), *([own] if own else [])):
        for path in sorted((base / kind).glob("*.y*ml")):
            if path.suffix in ENDINGS:
                found[path.stem] = path
    return dict(sorted(found.items()))


def find(kind: str, word: str, own: Path | None = None) -> Path:
    """Return the file that a word means.

    Raises:
        LaunchError: If there is no such file, or the folder of one's own has neither folder.
    """
    if own is not None and not any((own / name).is_dir() for name in ("executors", "profiles")):
        raise LaunchError(
            "The folder of your own has no executors and no profiles",
            given=str(own),
            allowed="a folder with executors/ or profiles/, files NAME.yaml in them",
            hint=f"{own}/{kind}/mine.yaml",
        )
    if "/" in word or word.endswith(ENDINGS):
        return Path(word).expanduser()
    known = names(kind, own)
    if word in known:
        return known[word]
    one = kind.removesuffix("s")
    raise LaunchError(
        f"No {one} is called {word!r}",
        given=repr(word),
        allowed=", ".join(known) + ", or the path of a file",
        hint=nearest(word, known) or f"a file of your own, ./{word or 'mine'}.yaml",
    )
