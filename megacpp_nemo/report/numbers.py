"""Numbers as people read them: three digits that matter, and a unit."""

from __future__ import annotations

KIB = 1024
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
DECIMAL = ("", "K", "M", "B", "T")
RATES = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
MINUS = "\N{MINUS SIGN}"


def count(number: float) -> str:
    """Return a number of things, as `4.69 B`; B is 10^9."""
    return _scaled(number, DECIMAL, 1000)


def size(number_bytes: float) -> str:
    """Return a size in bytes, as `8.74 GiB`."""
    return _scaled(number_bytes, BINARY, KIB)


def work(flops: float) -> str:
    """Return a number of floating-point operations, as `9.38 GFLOP`."""
    return _scaled(flops, RATES, 1000)


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent; a dash where there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def change(before: float, after: float) -> str:
    """Return how much more the second is, in percent, or `same`."""
    if before == after:
        return "same"
    if not before:
        return "new"
    percent = 100 * (after - before) / before
    text = f"{abs(percent):.1f}%" if abs(percent) < 1000 else f"x {after / before:.3g}"
    return text if text.startswith("x") else ("+" if percent > 0 else MINUS) + text


def _scaled(number: float, units: tuple[str, ...], step: int) -> str:
    place = 0
    # What rounds up to a whole step is told in the next unit.
    while place < len(units) - 1 and round(abs(number)) >= step:
        number, place = number / step, place + 1
    decimals = 0 if place == 0 else max(0, 3 - len(f"{abs(number):.2f}".partition(".")[0]))
    return f"{number:.{decimals}f} {units[place]}".rstrip()
