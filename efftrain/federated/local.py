"""Strategies that change how a client trains, FedProx and SCAFFOLD: what both ends share, and what cannot be combined.

Note [control variates]
    SCAFFOLD's server holds a control variate ``c``, its clients one each, ``c_i``: the gradients that they saw last, on
    average and their own. A client trains with ``gradient + c - c_i``. On the wire ``c`` is more tensors of the model,
    named ``control/NAME``, and the update of such a tensor is ``c_i_new - c_i``; so codec, gate, bytes and journal
    treat it as any other. The global model stays without them: they are the strategy's own (``Scaffold``), and the
    client's app never sees a ``c_i`` either. ``uplink_mod`` keeps it: what the app gets as ``control/NAME`` is the
    correction ``c - c_i``, what it replies under that name is ``c_i_new``.

    Like error feedback, a ``c_i`` becomes valid only when the server took the reply that it went out with: see Note
    [feedback over rounds] in ``uplink``. What a codec could not send of ``c_i_new - c_i`` needs no memory of its own:
    the client moves its ``c_i`` by what the server decodes, and the next difference is taken from there. So the sum of
    all ``c_i`` is ``num_clients * c``, whatever was lost, refused or left out, up to the rounding of floats.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efftrain.federated.recipe import FederatedRecipe

FEDPROX, SCAFFOLD = "fedprox", "scaffold"
CONTROL = "control/"
"""What the name of a control variate begins with; a module's own tensors have no slash in their names."""
PROXIMAL_MU = "proximal-mu"
"""Flower's key for the weight of the proximal term, in the config of a training message."""
ENGINES_THAT_CORRECT = ("torch", "vmap")
"""Engines that can add something to a gradient. The others train in generated code, which has no place for it yet."""


def num_steps(num_samples: int, batch_size: int, epochs: int) -> int:
    """Steps of a client's training: ``K`` of the papers."""
    return epochs * math.ceil(num_samples / batch_size)


def corrects_gradients(recipe: "FederatedRecipe") -> bool:
    """Whether the strategy has clients add something to their gradients."""
    return rule_of(recipe) in (FEDPROX, SCAFFOLD)


def check_local_strategy(recipe: "FederatedRecipe") -> None:
    """Refuse what a strategy that changes the clients' training cannot be combined with.

    Raises:
        ValueError: Names both, and says what to do.
    """
    client, name = recipe.client, rule_of(recipe)
    if not corrects_gradients(recipe):
        return
    if client.engine not in ENGINES_THAT_CORRECT:
        raise ValueError(
            f"server.strategy {name} adds to the clients' gradients, which the {client.engine} engine cannot do; set "
            f'client.engine="{ENGINES_THAT_CORRECT[0]}" and leave client.scheme at "fp32", or choose another strategy'
        )
    if name != SCAFFOLD:
        return
    if recipe.fedbuff.buffer:
        raise ValueError(
            f"server.strategy {SCAFFOLD} needs rounds, but fedbuff.buffer is {recipe.fedbuff.buffer}: a late update "
            "counts less, a control variate must count in full; set fedbuff.buffer=0 or another strategy"
        )
    if client.momentum:
        raise ValueError(
            f"server.strategy {SCAFFOLD} takes the mean gradient of a client from how far plain SGD moved its model, "
            f"but client.momentum is {client.momentum}; set client.momentum=0.0"
        )
    if recipe.attack.kind == "alie":
        raise ValueError(
            f"attack.kind alie trains as other clients do, whose control variates nobody but they know under "
            f"server.strategy {SCAFFOLD}; choose another attack or strategy"
        )


def rule_of(recipe: "FederatedRecipe") -> str:
    """Name of the strategy, or of the one inside it."""
    server = recipe.server
    return str(server.strategy_options.get("rule", "")) if server.strategy == "bucketing" else server.strategy
