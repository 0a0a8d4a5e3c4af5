"""Numbers as a reader wants them: few digits, a real minus sign, round marks on an axis."""

import math

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
"""What stands where there is no number."""

UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def number(value: float) -> str:
    """Write a number with three digits that count."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}".replace("-", MINUS)
    digits_after = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits_after}f}".replace("-", MINUS)


def percent(value: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.{0 if abs(value) >= 0.1 or value == 0 else 1}f}%".replace("-", MINUS)


def change(value: float) -> str:
    """Write a difference with its sign."""
    return ("+" if value > 0 else "") + number(value)


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers between two, which are evenly spaced.

    Args:
        low: The lower end.
        high: The upper end, above `low`.
        count: About how many to return.
        whole: Whether they must be whole numbers.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= 0.999 * rough)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # A sum of steps would collect rounding errors, and -0.0 would get a sign.
    return [i * step + 0.0 for i in range(first, last + 1)]


def tick_texts(values: list[float], *, share: bool = False) -> list[str]:
    """Write the marks of an axis, all with the same number of digits.

    Args:
        values: What `ticks` returned.
        share: Whether they are written as percentages.
    """
    largest = max(map(abs, values), default=0.0)
    if largest and (largest >= 1e12 or largest < 1e-3):
        return [number(value) if value else "0" for value in values]
    unit, size = next((x for x in UNITS if largest >= 10 * x[1]), ("", 1.0))
    unit, size = ("%", 0.01) if share else (unit, size)
    scaled = [value / size for value in values]
    largest /= size
    digits = 0
    while digits < 6 and any(abs(x - round(x, digits)) > 1e-9 * largest for x in scaled):
        digits += 1
    return [f"{x:,.{digits}f}{unit}".replace("-", MINUS) for x in scaled]
