"""stub"""


def report_command() -> None:
    """Stub."""
