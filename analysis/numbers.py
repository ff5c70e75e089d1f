"""Numbers as people read them: points, seconds, bytes."""

import math

MINUS = "\N{MINUS SIGN}"


def missing(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def percent(share: float | None) -> str:
    """0.4837 -> '48.4'."""
    return "–" if missing(share) else f"{100 * share:.1f}"


def points(share: float | None) -> str:
    """A signed difference in percentage points: 0.0312 -> '+3.1'."""
    if missing(share):
        return "–"
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def seconds(value: float | None) -> str:
    """252.3 -> '4 min 12 s'."""
    if missing(value):
        return "unknown"
    if value < 10:
        return f"{value:.1f} s" if value else "0 s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Bytes in units of 1000: 269060552 -> '269 MB'."""
    if missing(value):
        return "unknown"
    value = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            break
        value /= 1000
    else:
        unit = "TB"
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.1f} {unit}"
