"""A user's own model and data (``file.py:name``), which only the process of that user runs.

Note [own code]
    A recipe travels from the server to the clients with every training message, and what a server names must not become
    code that a client runs. In one process server and clients are the same person: ``run_federated`` allows what its
    recipe names, and a message may name that. Elsewhere nothing is allowed. On a network a model of one's own is an app
    of one's own (``federated/own_app.py``).
"""

from efftrain.errors import ConfigError
from efftrain.federated.recipe import FederatedRecipe, is_own

_allowed: set[str] = set()


def allow(recipe: FederatedRecipe) -> None:
    """This process is of whoever wrote the recipe: it may run the files that it names."""
    _allowed.update(_named(recipe))


def check(recipe: FederatedRecipe) -> None:
    """To be called where a recipe comes in from elsewhere.

    Raises:
        ConfigError: It names a file that this process did not ``allow``.
    """
    for name in _named(recipe):
        if name not in _allowed:
            raise ConfigError(
                f"{name!r} names a file of code, which is run in one process only (efftrain federate), never by order "
                "of a message or a run config. Expected a model and data that efftrain has; for your own on a network "
                "write an app, as in federated/own_app.py"
            )


def _named(recipe: FederatedRecipe) -> list[str]:
    return [name for name in (recipe.model.name, recipe.data.name) if is_own(name)]
