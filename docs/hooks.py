"""What the site does beyond its generator: pages may link to measurements beside this folder.

The results of `benchmarks/` are part of the site, where pages that name them as
`../benchmarks/results/NAME` find them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
LINK = re.compile(rf"\]\((?:\.\./)+({RESULTS}/[^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the measurements' results to the files of the site."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".json"):
            name = f"{RESULTS}/{path.name}"
            added = File.generated(config, name, abs_src_path=str(path))
            added.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to the results into links within the site."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda found: f"]({up}{found.group(1)})", markdown)
