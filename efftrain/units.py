"""Figures for people: bytes, counts and times in a fixed, short form."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(num_bytes: float) -> str:
    """``1536`` -> ``"1.5 KiB"``. Binary units, because every memory and message here is a power-of-two affair."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        text = f"{value:.0f}" if unit == "B" else f"{value:.1f}"
        if abs(float(text)) < 1024 or unit == "GiB":  # what is shown decides: never "1024.0 KiB"
            return f"{text} {unit}"
        value /= 1024
    raise AssertionError("the last unit always returns")


def format_count(count: float) -> str:
    """``54314`` -> ``"54.3 k"``. Decimal units: parameters, MACs, instructions."""
    value = float(count)
    for unit in ("", " k", " M", " G"):
        text = f"{value:.0f}" if unit == "" else f"{value:.1f}"
        if abs(float(text)) < 1000 or unit == " G":
            return text + unit
        value /= 1000
    raise AssertionError("the last unit always returns")


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``"1 min 15 s"``, ``3700`` -> ``"1 h 2 min"``; below a minute one decimal, below a second
    milliseconds."""
    if round(1000 * seconds) < 1000:
        return f"{1000 * seconds:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    for unit, smaller, size, most in (("min", "s", 1, 60), ("h", "min", 60, 24)):
        whole, rest = divmod(round(seconds / size), 60)
        if whole < most:  # what is shown decides: never "60 min 0 s"
            return f"{whole} {unit} {rest} {smaller}"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
