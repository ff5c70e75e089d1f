"""Numbers as people read them: points, seconds, bytes."""

import math
from decimal import ROUND_HALF_UP, Decimal

MINUS = "\N{MINUS SIGN}"


def missing(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def percent(share: float | None) -> str:
    """0.4837 -> '48.4'."""
    return "–" if missing(share) else f"{_tenths(100 * share)}"


def change(value: float) -> str:
    """A difference of counts with one decimal place: -1.25 -> '−1.2'."""
    return f"{value:.1f}".replace("-", MINUS)


def fine_percent(share: float | None) -> str:
    """Three digits of a percentage, for shares far below one percent: 0.000123 -> '0.0123'."""
    return "–" if missing(share) else f"{100 * share:#.3g}".rstrip(".") if share else "0"


def points(share: float | None) -> str:
    """A signed difference in percentage points: 0.0312 -> '+3.1'."""
    if missing(share):
        return "–"
    text = f"{_tenths(100 * share):+}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def _tenths(value: float) -> Decimal:
    """Rounded to a tenth, halves away from 0; what a sum adds behind the ninth digit does not decide."""
    return Decimal(repr(round(float(value), 9))).quantize(Decimal("0.1"), ROUND_HALF_UP)


def nats(value: float | None) -> str:
    """A signed number of nats: 0.4512 -> '+0.451', 0.00042 -> '+0.0004', 0.00007 -> '+0.00007'."""
    if missing(value):
        return "–"
    text = f"{value:+.3f}"
    if float(text) == 0:
        first = float(f"{value:.0e}")
        text = f"{first:+.{-math.floor(math.log10(abs(first)))}f}" if abs(value) > 1e-9 else "0"
    return text.replace("-", MINUS)


def rate(value: float) -> str:
    """A learning rate: 0.00015 -> '1.5e-4', 0.1 -> '0.1'."""
    if not value or value >= 0.01:
        return f"{value:g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def p(value: float | None) -> str:
    """A p value: 0.0123 -> 'p = 0.012', 0.0004 -> 'p < 0.001', with spaces at which no line breaks; '' if missing."""
    if missing(value):
        return ""
    return (
        "p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}0.001"
        if value < 0.001
        else f"p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{value:.3f}"
    )


def seconds(value: float | None) -> str:
    """252.3 -> '4 min 12 s'."""
    if missing(value):
        return "unknown"
    if value < 0.95:
        return f"{1000 * value:.0f} ms" if value >= 0.0005 else "0 s"
    if value < 10:
        return f"{value:.1f} s"
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
    value, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 99.5 or units[0] == "B" else f"{value:.1f} {units[0]}"


def times(ratio: float | None) -> str:
    """A multiple of a reference: 1.183 -> '×1.18', 24.7 -> '×24.7', 0.0411 -> '×0.041'."""
    if missing(ratio):
        return "–"
    if ratio < 0.0995:
        return f"×{ratio:.2g}"
    return f"×{ratio:.0f}" if ratio >= 99.5 else f"×{ratio:.1f}" if ratio >= 9.95 else f"×{ratio:.2f}"


def count(value: float | None) -> str:
    """A measured number of things, to three digits: 71528.6 -> '71,500'."""
    return "–" if missing(value) else f"{float(f'{value:.3g}'):,.0f}"
