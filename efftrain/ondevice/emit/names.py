"""What may stand in generated C: names are made here or checked here, the user's own appear in comments only."""

import re

from efftrain.errors import ConfigError

_KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        "auto break case char const continue default do double else enum extern float for goto if inline int long "
        "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while "
        "main startup driver eft",
    )
)


def check_identifier(name: str) -> str:
    """A prefix for the functions of a program.

    Raises:
        ConfigError: It is not an identifier of C, or one that C or the runtime already uses.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in _KEYWORDS or name.startswith("eft_"):
        raise ConfigError(
            f"program name {safe(name)!r} cannot be a C prefix; use lower-case letters, digits and _, at most "
            f"31, no keyword"
        )
    return name


def safe(name: str) -> str:
    """A name that may stand in a comment or a message: letters, digits, ``.``, ``_``, ``#``, ``-``; at most 60."""
    return re.sub(r"[^A-Za-z0-9._#-]", "_", name)[:60]
