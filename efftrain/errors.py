"""Errors that a user, a file, a device or a peer can cause.

Each message says what was wrong, what was expected and what to do. The command line prints it as one line and exits
with a status other than 0; anything that is not an ``EfftrainError`` is a bug of ours and keeps its traceback.
"""


class EfftrainError(Exception):
    """Base of every error with a remedy. Catch this to catch them all."""


class ConfigError(EfftrainError, ValueError):
    """A recipe, an option or an argument has an unknown key or a value out of its range."""


class DataError(EfftrainError):
    """A data file is missing, truncated, corrupt or not what its name says."""


class PayloadError(EfftrainError):
    """Bytes from a wire are not a valid payload. Raised for every malformed input, never anything else."""


class NonFiniteError(EfftrainError, ArithmeticError):
    """A gradient, loss or update holds inf or NaN. The message names the parameter."""


class CheckpointError(EfftrainError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another model or recipe."""


class PeerError(EfftrainError):
    """Another rank of the cluster died or did not answer in time. That rank's own message says why."""


class ReplicaError(EfftrainError):
    """Ranks that should hold the same weights do not."""


class CompileError(EfftrainError):
    """A model cannot be turned into a device program. The message names the operator and its place."""


class BudgetError(EfftrainError):
    """A plan needs more memory than its device has."""


class ToolError(EfftrainError):
    """A compiler, emulator or optional package is missing or failed. The message says which line installs it."""


class DeviceFault(EfftrainError):
    """A device program touched memory it does not have, or did not finish within its instruction limit."""


class RoundError(EfftrainError):
    """A federated round could not be completed: quorum missed, deadline passed with too few replies."""


class ClaimError(EfftrainError):
    """A run finished, but a result that it promises was not reached."""
