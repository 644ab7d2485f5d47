"""Figures for people: bytes, counts and times in a fixed, short form."""

KIB = 1024
MIB = 1024 * KIB


def format_bytes(num_bytes: float) -> str:
    """``1536`` -> ``"1.5 KiB"``. Binary units, because every memory and message here is a power-of-two affair."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit always returns")


def format_count(count: float) -> str:
    """``54314`` -> ``"54.3 k"``. Decimal units: parameters, MACs, instructions."""
    value = float(count)
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000 or unit == " G":
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError("the last unit always returns")


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``"1 min 15 s"``; below a minute one decimal, below a second milliseconds."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
