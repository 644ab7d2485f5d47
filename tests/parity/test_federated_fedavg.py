"""Our rounds against FedAvg written out by hand in torch: no Flower, no codec, no grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from efftrain.data import load_watch, standardize
from efftrain.federated import FederatedRecipe, run_federated
from efftrain.federated.recipe import ClientConfig, DataConfig, RoundsConfig, UplinkConfig
from efftrain.models import build_model

RECIPE = FederatedRecipe(
    seed=11,
    data=DataConfig(people=(2, 3, 9)),
    client=ClientConfig(epochs=2, batch_size=16, lr=0.05, momentum=0.5),
    server=RoundsConfig(rounds=3),
    uplink=UplinkConfig(codec="Identity()"),
)


def by_hand(recipe: FederatedRecipe) -> tuple[dict[str, torch.Tensor], float]:
    """McMahan et al., arXiv:1602.05629, algorithm 1, with every client in every round."""
    torch.manual_seed(recipe.seed)
    model = build_model("watch-cnn")
    world = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch = load_watch()
    _, scale = standardize(watch.select(recipe.data.people, "early"))
    for number in range(1, recipe.server.rounds + 1):
        states, sizes = [], []
        for client, person in enumerate(recipe.data.people):
            data = standardize(watch.select(person, "middle"), scale)[0]
            model.load_state_dict(world)
            optimizer = torch.optim.SGD(model.parameters(), lr=recipe.client.lr, momentum=recipe.client.momentum)
            rng = np.random.default_rng(np.random.SeedSequence([recipe.seed, number, client]).generate_state(1)[0])
            for _ in range(recipe.client.epochs):
                for batch in torch.split(torch.from_numpy(rng.permutation(len(data))), recipe.client.batch_size):
                    optimizer.zero_grad()
                    logits = model(torch.from_numpy(data.inputs)[batch])
                    nn.functional.cross_entropy(logits, torch.from_numpy(data.targets)[batch]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            sizes.append(len(data))
        shares = [size / sum(sizes) for size in sizes]
        world = {n: sum((k * s[n] for k, s in zip(shares, states, strict=True)), torch.zeros(())) for n in world}
    model.load_state_dict(world)
    rights = []
    for person in recipe.data.people:
        test = standardize(watch.select(person, "late"), scale)[0]
        with torch.no_grad():
            right = model(torch.from_numpy(test.inputs)).argmax(dim=1) == torch.from_numpy(test.targets)
        rights.append(right.float().mean().item())
    return world, float(np.mean(rights))


@pytest.mark.parametrize("feedback", [True, False])
def test_identity_codec_is_plain_fedavg(feedback: bool) -> None:
    """Ours sends ``trained - sent`` and adds it to ``sent`` again: two more roundings of at most 2**-24 relative to
    weights below 2, a client and round. Training in later rounds spreads them; 3 rounds stay far below 1e-5, while one
    changed sample order, weight or batch shows at 1e-3."""
    recipe = replace(RECIPE, uplink=UplinkConfig(codec="Identity()", feedback=feedback))
    expected, accuracy = by_hand(recipe)
    result = run_federated(recipe)
    for name, tensor in expected.items():
        torch.testing.assert_close(result.state[name], tensor, rtol=0, atol=1e-5)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-6)
    wrong = run_federated(replace(recipe, seed=12), initial=None)
    assert max((wrong.state[n] - expected[n]).abs().max().item() for n in expected) > 1e-3


def test_every_element_through_top_k_is_identity() -> None:
    """TopK(1.0) sends everything as it is: the same model to the last bit, at a few more bytes."""
    plain, top = run_federated(RECIPE), run_federated(replace(RECIPE, uplink=UplinkConfig(codec="TopK(1.0)")))
    assert top.final_sha256 == plain.final_sha256
    assert top.total("uplink_bytes") > plain.total("uplink_bytes")
