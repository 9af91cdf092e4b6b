"""Drawings as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from megacpp_nemo.runs.figures import COLORS

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 }
p { margin: .4rem 0 }
.panels + p { margin-top: 1.5rem }
.quiet { color: var(--quiet) }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.25rem 0 }
.facts div { min-width: 6rem }
.facts dt { color: var(--quiet); font-size: .85rem }
.facts dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums }
.panels { display: grid; gap: 1.75rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; min-width: 0; break-inside: avoid }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
img { max-width: 100% }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td, th { border: 1px solid var(--grid); padding: .2rem .5rem; text-align: right }
td:first-child, th:first-child { text-align: left }
"""


def document(title: str, body: str) -> str:
    """Return a whole page of a title and a body, which is HTML, light or dark as one reads."""
    light = "; ".join(f"--{name}: {color}" for name, (color, _) in COLORS.items())
    dark = "; ".join(f"--{name}: {color}" for name, (_, color) in COLORS.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
@media print {{ :root {{ {light} }} }}
{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def run_page(
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
    figures: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """Return the page of a run.

    Args:
        title: The run.
        subtitle: What it is, in a line.
        facts: Its figures by their names.
        figures: Drawings, SVG elements, by their titles.
        notes: What should be known beside them.
    """
    listed = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    drawn = "\n".join(
        f"<figure><figcaption><h2>{html.escape(name)}</h2></figcaption>\n{figure}</figure>"
        for name, figure in figures.items()
    )
    said = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in notes)
    body = (
        f'<p class="quiet">{html.escape(subtitle)}</p>\n<dl class="facts">{listed}</dl>\n'
        f'<div class="panels">\n{drawn}\n</div>\n{said}'
    )
    return document(title, body)
