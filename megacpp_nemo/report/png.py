"""A picture as PNG: its SVG, drawn with fonts that come with matplotlib and not the machine's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.report.picture import Picture
from megacpp_nemo.report.svg import svg

FONTS = Path("mpl-data", "fonts", "ttf")
# Pixels to a unit of the SVG: sharp on screens that show two for one.
ZOOM = 2


class PictureError(MegaCppError):
    """A picture that cannot be drawn here."""


def png(picture: Picture, *, zoom: float = ZOOM) -> bytes:
    """Return a picture as a PNG file, the same on every machine.

    Raises:
        PictureError: If what draws it is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise _missing("resvg-py") from None
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise _missing("matplotlib")
    fonts = str(Path(found.origin).parent / FONTS)
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg(picture), font_dirs=[fonts], skip_system_fonts=True, zoom=zoom
        )
    )


def _missing(package: str) -> PictureError:
    return PictureError(
        "A PNG is drawn from the SVG, and what draws it is not installed",
        given=f"no package {package}",
        allowed="resvg-py, and matplotlib for its fonts",
        hint=f"pip install {package}, or --format svg",
    )
