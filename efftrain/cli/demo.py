"""stub"""


def demo_command() -> None:
    """Stub."""
