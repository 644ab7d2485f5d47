"""Plans without processes: what is refused and with which remedy, how models are cut and divided."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from efftrain.compression import Deflate, Int8, LowRank, TopK
from efftrain.config import load_recipe
from efftrain.errors import ConfigError
from efftrain.models import build_model
from efftrain.parallel import ClusterRecipe, Plan, SyncConfig, train
from efftrain.parallel.batch_norm import warn_of_pieces
from efftrain.parallel.graph import part_of
from efftrain.parallel.pipeline import SCHEDULES, stages_a_rank, stages_of
from efftrain.parallel.recompute import recompute
from efftrain.parallel.stages import balance, cut_model
from efftrain.parallel.tensor import plan_tensor
from efftrain.training import StepConfig, cross_entropy
from tests.conftest import ROOT

SHAPES = {
    "char-transformer": (4, 32),
    "mlp-10m": (4, 1, 28, 28),
    "fashion-cnn": (4, 1, 28, 28),
    "resnet8": (4, 3, 32, 32),
    "watch-cnn": (4, 6, 128),
}


def example(name: str) -> Tensor:
    torch.manual_seed(1)
    shape = SHAPES[name]
    return torch.randint(256, shape) if name == "char-transformer" else torch.randn(shape)


# Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 0}, r"plan\.tensor is 0, expected at least 1"),
        ({"tensor": "2"}, r"'plan\.tensor' is '2', expected a whole number"),
        ({"data": 2.0}, r"'plan\.data' is 2\.0, expected a whole number"),
        ({"compile": 1}, r"'plan\.compile' is 1, expected true or false"),
        ({"pipeline": 2, "schedule": "2f2b"}, r"'plan\.schedule' is '2f2b', expected one of 'gpipe', '1f1b'"),
        ({"shard": "ful"}, r"'plan\.shard' is 'ful', expected one of .* \(nearest: 'full'\)"),
        ({"checkpointing": "some"}, r"'plan\.checkpointing' is 'some', expected one of 'none', 'selective', 'full'"),
        ({"exchange": "nccl"}, r"'plan\.exchange' is 'nccl', expected one of 'auto', 'ddp', 'gradsync'"),
        ({"backend": "gloo"}, r"'plan\.backend' is 'gloo', expected one of 'torch', 'horovod'"),
        ({"codec": "Int8()"}, r"plan\.codec is 'Int8\(\)', expected a codec such as Int8\(\) .* parse_codec"),
        ({"sync": {"node_size": 2}}, r"plan\.sync is \{'node_size': 2\}, expected a SyncConfig"),
        ({"tensor": 2, "tensor_styles": "rows"}, r"plan\.tensor_styles is 'rows', expected names of modules"),
        ({"microbatches": 4}, r"about the pipeline axis, which has one rank; .* set step\.micro_batches"),
        ({"pipeline": 2, "schedule": "dualpipev", "microbatches": 3}, "microbatches=3; take 4"),
        ({"pipeline": 4, "schedule": "interleaved_1f1b", "microbatches": 10, "data": 1}, None),
        ({"pipeline": 4, "schedule": "interleaved_1f1b", "microbatches": 13}, "take 12"),
        ({"pipeline": 2, "schedule": "zbv", "shard": "full"}, r"Take shard=grads, or schedule=interleaved_1f1b"),
        ({"codec": Int8() >> Deflate()}, r"Deflate saves nothing; take Int8\(block=256"),
        ({"exchange": "ddp", "codec": Int8()}, r"DDP carries no codec .* take exchange=gradsync"),
        ({"exchange": "ddp", "pipeline": 2, "schedule": "zbv"}, r"DDP's hooks .* schedule zbv; take exchange=gradsync"),
        ({"exchange": "ddp", "tensor": 2}, r"DDP's hooks do not see"),
        ({"shard": "full", "exchange": "gradsync"}, "sharded weights are exchanged by fully_shard"),
        ({"shard": "full", "codec": LowRank(2)}, "cannot encode the shards"),
        ({"shard": "grads", "momentum_correction": True, "codec": TopK(0.1)}, "belong to gradsync"),
        ({"shard_size": 2}, "set shard=full or shard=grads"),
        ({"backend": "horovod", "tensor": 2}, r"Horovod has the data axis only; set parallel\.backend=torch"),
        ({"sequence": True}, "about the tensor axis"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        Plan(**settings)
        return
    with pytest.raises(ConfigError, match=message):
        Plan(**settings)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"data": 4}, 2, r"wants 4 data-parallel processes, 2 were started; start with torchrun --nproc-per-node 4 or"),
        (
            {"tensor": 2, "pipeline": 2},
            6,
            r"any data x 2 tensor x 2 pipeline processes, a multiple of 4, 6 were started",
        ),
        ({"data": 2, "tensor": 2}, 8, r"start with torchrun --nproc-per-node 4 or set parallel\.data=4"),
        ({"shard": "full", "shard_size": 3}, 4, r"shard_size is 3, expected a divisor of the data axis, 4 ranks"),
        (
            {"tensor": 2, "codec": Int8(), "sync": SyncConfig(node_size=3)},
            6,
            "nodes of 3 ranks cannot hold whole tensor",
        ),
        ({"pipeline": 2, "codec": Int8(), "sync": SyncConfig(node_size=4)}, 4, "divide the 2 ranks of a stage; choose"),
    ],
)
def test_another_number_of_processes(settings: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**settings).check(world_size)


def test_a_model_that_does_not_fit_is_refused_without_processes() -> None:
    model, inputs = build_model("char-transformer", width=32, depth=2, heads=2, context=32), example("char-transformer")
    Plan(tensor=2, pipeline=2).check(4, model, inputs)
    with pytest.raises(ConfigError, match=r"needs an example: plan\.apply\(model, inputs\)"):
        Plan(tensor=2).check(2, model)
    with pytest.raises(ConfigError, match=r"a batch of 4, expected a multiple of 8: 1 replicas x 8 micro-batches"):
        Plan(pipeline=4).check(4, model, inputs)
    with pytest.raises(ConfigError, match=r"parallel\.tensor must divide the heads"):
        Plan(tensor=4).check(4, model, inputs)
    tied = build_model("char-transformer", width=32, depth=2, heads=2, context=32, tied=True)
    Plan(pipeline=2).check(2, tied, inputs)
    Plan(pipeline=2, schedule="zbv", microbatches=2, codec=Int8()).check(4, tied, inputs)
    with pytest.raises(ConfigError, match=r"'embedding\.weight' is used in pipeline stages 0 and 1; .* or untie it"):
        Plan(pipeline=2, microbatches=2, codec=Int8()).check(4, tied, inputs)
    with pytest.raises(ConfigError, match=r"cannot hold it there: set parallel\.tensor=1 and parallel\.shard=none"):
        Plan(pipeline=2, microbatches=2, shard="grads").check(4, tied, inputs)


class Blocks(nn.Module):
    """Blocks in a list, and more."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        y: Tensor = self.head(x)
        return y


def test_what_a_sharded_data_axis_cannot_divide_is_refused_without_processes() -> None:
    plan = Plan(shard="full")
    scalar = Blocks(nn.Linear(8, 8))
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        ConfigError, match=r"'scale' is a scalar, .* give it the shape \(1,\), or set parallel\.shard=no"
    ):
        plan.check(2, scalar)
    plan.check(1, scalar)
    for place in ("blocks.1", "head"):
        tied = Blocks(nn.Linear(8, 8), nn.Linear(8, 8))
        tied.get_submodule(place).weight = tied.get_submodule("blocks.0").weight
        with pytest.raises(ConfigError, match=rf"weight' and '{place}\.weight' are one .* or give each layer its own"):
            plan.check(2, tied)
    twice = nn.Linear(8, 8)
    plan.check(2, Blocks(twice, twice))  # one layer, called twice
    within = Blocks(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    within.get_submodule("blocks.0.1").weight = within.get_submodule("blocks.0.0").weight
    plan.check(2, within)
    with pytest.raises(ConfigError, match="is a scalar"):
        Plan(shard="grads", pipeline=2, microbatches=1).check(2, _scaled(), torch.randn(4, 8))


def _scaled() -> Blocks:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return Blocks(nn.Linear(8, 8), Scale())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], r"any data x 3 tensor x 1 pipeline processes, a multiple of 3, 4 were started"),
        (["parallel.tensor=4"], r"no layer of WatchCNN can be divided by 4"),
        (["parallel.pipeline=4", "parallel.schedule=zbv"], r"can be cut into 4 stages at most, the plan wants 8"),
        (
            ["parallel.pipeline=2", "loop.batch_size=6"],
            r"batch_size is 6, expected a multiple of 8: 2 ranks of the data",
        ),
        (["parallel.pipeline=2", "step.micro_batches=2"], "a pipeline cuts its batch already"),
        (["parallel.checkpointing=full"], "WatchCNN has no ModuleList of blocks"),
        (["parallel.pipelines=2"], "unknown key 'parallel.pipelines'; nearest is 'parallel.pipeline'"),
    ],
)
def test_a_recipe_is_refused_before_the_processes_meet(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # and no address to meet at
    path = ROOT / "parallel" / "recipes" / "watch_ddp_topk.toml"
    with pytest.raises(ConfigError, match=message):
        train(load_recipe(ClusterRecipe, path, overrides), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Batch norm -------------------------------------------------------------------------------------------------------


def _synced(model: nn.Module) -> nn.Module:
    found: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return found


def test_batch_norm_in_pieces_of_a_batch_is_told_once() -> None:
    model = build_model("resnet8")
    said = (
        r"BatchNorm2d 'norm' \(and 6 more\) normalizes each of the 4 pieces .* gradients are not those of one process"
        r".*\.convert_sync_batchnorm\(model\) .* nn\.GroupNorm is right with every plan"
    )
    with pytest.warns(UserWarning, match=said) as told:
        Plan().apply(model, step=StepConfig(micro_batches=4))
    assert len(told) == 1
    Plan().apply(model)  # warnings are errors here
    Plan().apply(build_model("fashion-cnn"), step=StepConfig(micro_batches=4))
    warn_of_pieces(_synced(model), 2, 1)
    with pytest.warns(UserWarning, match=r"SyncBatchNorm 'norm' .* each of the 4 pieces"):
        warn_of_pieces(_synced(model), 2, 2)


def test_batch_norm_that_would_wait_or_count_twice_is_refused() -> None:
    model, inputs = _synced(build_model("resnet8")), example("resnet8")
    with pytest.raises(ConfigError, match=r"those of other pipeline stages do not answer; .* parallel\.pipeline=1"):
        Plan(pipeline=2).check(2, model, inputs)
    Plan(pipeline=2).check(2, build_model("resnet8"), inputs)
    for kind in ("full", "selective"):
        with pytest.raises(
            ConfigError, match=r"'blocks\.0\.1' would update its running statistics twice .* nn\.GroupNorm"
        ):
            Plan(checkpointing=kind).check(1, Blocks(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    without = nn.BatchNorm1d(8, track_running_stats=False)
    Plan(checkpointing="full").check(1, Blocks(nn.Sequential(nn.Linear(8, 8), without)))


# Stages -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_there_is(costs: list[float], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    ends = balance(costs, parts)
    assert ends == sorted(set(ends))
    assert len(ends) == parts
    assert ends[-1] == len(costs)

    def worst(cuts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))

    best = min(worst(cuts) for cuts in itertools.combinations(range(1, len(costs)), parts - 1))
    assert worst(tuple(ends[:-1])) <= best + 1e-9


@pytest.mark.parametrize(("name", "num_stages"), [(name, n) for name in SHAPES for n in (1, 2, 4)])
def test_stages_in_a_row_are_the_model(name: str, num_stages: int) -> None:
    model, inputs = build_model(name).eval(), example(name)
    stages = cut_model(model, inputs, num_stages)
    value = inputs
    for stage in stages:
        assert tuple(value.shape) == stage.input_shape
        assert value.dtype == stage.input_dtype
        value = stage.build(model)(value)
    assert torch.equal(value, model(inputs))
    names = [name for stage in stages for name, _ in stage.build(model).named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters()), "each parameter in one stage"
    assert all(any(True for _ in stage.build(model).parameters()) for stage in stages)


def test_what_no_stage_uses_is_with_the_last() -> None:
    model = build_model("char-transformer", width=32, depth=2, heads=2, context=32)
    model.register_module("spare", torch.nn.Linear(3, 2))
    model.get_submodule("blocks.0").register_parameter("scale", torch.nn.Parameter(torch.ones(5)))
    for num_stages in (2, 6):
        first, *_, last = cut_model(model, example("char-transformer"), num_stages)
        in_a_block = {"blocks.0.scale"} if num_stages == 6 else set()
        assert {"spare.weight", "spare.bias"} | in_a_block <= set(last.names)
        assert not {"spare.weight", "spare.bias", "blocks.0.scale"} & set(first.names)


@pytest.mark.parametrize("frozen", [[0], [0, 1, 2], [2, 3], [1, 3]])
def test_frozen_layers_are_with_layers_that_are_trained(frozen: list[int]) -> None:
    model = Blocks(*(nn.Linear(8, 8) for _ in range(4)))
    for number in frozen:
        model.blocks[number].requires_grad_(False)
    num_stages = 5 - len(frozen)
    for cut in cut_model(model, torch.randn(4, 8), num_stages):
        assert any(parameter.requires_grad for parameter in cut.build(model).parameters()), cut.names
    with pytest.raises(ConfigError, match=rf"into {num_stages} stages at most, .* each with parameters that are train"):
        cut_model(model, torch.randn(4, 8), num_stages + 1)


def test_blocks_are_opened_only_if_need_be() -> None:
    model = build_model("char-transformer", width=32, depth=2, heads=2, context=32)
    inputs = example("char-transformer")
    assert any("blocks.0" in stage.names for stage in cut_model(model, inputs, 2))
    opened = {name for stage in cut_model(model, inputs, 6) for name in stage.names}
    assert "blocks.0.attention" in opened
    with pytest.raises(ConfigError, match=r"can be cut into \d+ stages at most, the plan wants 40"):
        cut_model(model, inputs, 40)


class Noisy(nn.Module):
    """Two halves; the first drops out by a function, which must know whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.one(x)), 0.5, training=self.training)
        result: Tensor = self.two(x)
        return result


def test_a_graph_that_knows_one_mode_only_is_refused() -> None:
    for training in (True, False):
        model = Noisy().train(training)
        with pytest.raises(ConfigError, match=r"model Noisy does something else in training .* use nn\.Dropout"):
            cut_model(model, torch.zeros(4, 8), 2)
        assert plan_tensor(model, torch.randn(4, 8), 2).styles == {"one": "columns", "two": "rows"}
        assert model.training == training
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    assert len(cut_model(module, torch.zeros(4, 8), 2)) == 2


def test_a_branch_on_values_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(
        ConfigError, match=r"Branching cannot be cut .* set parallel\.tensor=1 and parallel\.pipeline=1"
    ):
        cut_model(Branching(), torch.ones(2, 4), 2)


def test_a_part_has_the_order_of_the_whole() -> None:
    """So a weight that two of its layers share has one first name, under which codecs keep what they owe of it."""
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(6, 4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)}
    )
    model["head"].weight = model["tokens"].weight
    part = part_of(model, {"head", "tokens", "middle.bias"})
    assert [name for name, _ in part.named_parameters()] == ["tokens.weight", "middle.bias"]


def test_no_stage_ends_between_layers_that_share_features() -> None:
    model, inputs = build_model("mlp-10m", hidden=(64, 64, 64, 64, 64)), torch.randn(8, 1, 28, 28)
    together = plan_tensor(model, inputs, 2).together
    assert [sorted(group) for group in together] == [
        ["layers.1", "layers.3"],
        ["layers.5", "layers.7"],
        ["layers.11", "layers.9"],
    ]
    for stage in cut_model(model, inputs, 3, together=together):
        assert all(group <= set(stage.names) or group.isdisjoint(stage.names) for group in together)
    Plan(tensor=2, pipeline=3).check(6, model, torch.randn(12, 1, 28, 28))
    with pytest.raises(ConfigError, match="can be cut into 3 stages at most, the plan wants 4"):
        Plan(tensor=2, pipeline=2, schedule="interleaved_1f1b").check(4, model, inputs)


@pytest.mark.parametrize(("schedule", "size"), list(itertools.product(SCHEDULES, (2, 3, 4))))
def test_every_stage_has_one_rank(schedule: str, size: int) -> None:
    stages = [stage for rank in range(size) for stage in stages_of(rank, size, schedule)]
    assert sorted(stages) == list(range(size * stages_a_rank(schedule)))


# Tensor axis ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Heads written in several ways; only one of them can be divided."""

    mask: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("mask", torch.zeros(5, 5))

    def heads(self, x: Tensor) -> Tensor:
        b, t = x.shape[0], x.shape[1]
        shape = {"constant": (b, t, 4, 2), "fewer": (b, t, 4, -1), "right": (b, t, -1, 2)}[self.how]
        return x.view(*shape).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) + self.mask, -1)
        result: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return result


def test_attention_is_divided_by_heads() -> None:
    plan = plan_tensor(Attention("right"), torch.randn(2, 5, 8), 2)
    assert dict(plan.styles) == {"q": "columns", "k": "columns", "v": "columns", "o": "rows"}


@pytest.mark.parametrize(("how", "message"), [("constant", "the model fails"), ("fewer", "computes something else")])
def test_attention_that_would_be_wrong_is_refused(how: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_tensor(Attention(how), torch.randn(2, 5, 8), 2)


class Stack(nn.Module):
    """Linear layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(6, 8), between, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.between(self.a(x)))
        return F.relu(y) + x


class Scaled(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


def test_a_trained_parameter_keeps_what_it_meets_whole() -> None:
    """Its gradient would be that of a rank's part."""
    assert dict(plan_tensor(Stack(Scaled(False)), torch.randn(3, 6), 2).styles) == {"a": "columns", "b": "rows"}
    with pytest.raises(ConfigError, match="no layer of Stack can be divided by 2"):
        plan_tensor(Stack(Scaled(True)), torch.randn(3, 6), 2)


def test_layers_that_share_weights_stay_whole() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    assert set(plan_tensor(model, torch.randn(3, 6), 2).styles) == {"0", "1", "2", "3"}
    model[1].weight = model[0].weight
    assert set(plan_tensor(model, torch.randn(3, 6), 2).styles) == {"2", "3"}
    with pytest.raises(ConfigError, match=r"divides '0', whose weights another module has, too: .* Leave it 'whole'"):
        plan_tensor(model, torch.randn(3, 6), 2, {"0": "rows"})


@pytest.mark.parametrize("between", [nn.GELU(), nn.Dropout(0.5), nn.Identity()])
def test_a_pair_is_divided_across_element_wise_work(between: nn.Module) -> None:
    assert dict(plan_tensor(Stack(between), torch.randn(3, 6), 2).styles) == {"a": "columns", "b": "rows"}


@pytest.mark.parametrize("between", [nn.LayerNorm(8), nn.Softmax(-1), nn.BatchNorm1d(8)])
def test_what_needs_all_features_keeps_them_whole(between: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no layer of Stack can be divided by 2"):
        plan_tensor(Stack(between), torch.randn(3, 6), 2)


def test_styles_can_be_chosen() -> None:
    model = build_model("mlp-10m", hidden=(16, 16, 16))
    inputs = torch.randn(2, 1, 28, 28)
    found = plan_tensor(model, inputs, 2).styles
    assert found["layers.1"] == "columns"
    assert found["layers.3"] == "rows"
    chosen = plan_tensor(model, inputs, 2, {"layers.1": "whole"}).styles
    assert "layers.1" not in chosen
    assert chosen["layers.3"] == "columns"
    for names, message in (
        ({"layers.99": "rows"}, "which is no module of MLP"),
        ({"layers.1": "diagonal"}, r"expected one of columns, rows, entries"),
        ({"layers.2": "rows"}, "is a ReLU, it cannot be divided"),
        ({"layers.1": "rows"}, r"divided over 2 ranks the model fails"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_tensor(model, inputs, 2, names)


def test_positions_of_a_model_without_embeddings_stay_whole() -> None:
    with pytest.raises(ConfigError, match="starts at a divided embedding"):
        plan_tensor(Stack(nn.GELU()), torch.randn(3, 6), 2, sequence=True)


def test_one_process_needs_no_example() -> None:
    model = build_model("fashion-cnn")
    job = Plan().apply(model, objective=cross_entropy)
    result = job.step(torch.randn(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64))
    assert result.loss > 0


# Activation checkpointing -----------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, tokens: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    total = 0

    def count(value: Tensor) -> Tensor:
        nonlocal total
        total += value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        loss = cross_entropy(model, tokens, tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def test_recomputed_activations_give_the_same_gradients_in_less_memory() -> None:
    tokens = example("char-transformer")
    found = {}
    for kind in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = build_model("char-transformer", width=32, depth=4, heads=2, context=32)
        recompute(model, kind)
        found[kind] = saved_bytes(model, tokens)
    assert found["full"][0] < found["none"][0] / 3
    # What is kept by choice does not pass the hooks that count.
    assert found["selective"][0] < found["none"][0]
    for kind in ("selective", "full"):
        for grad, expected in zip(found[kind][1], found["none"][1], strict=True):
            assert torch.equal(grad, expected), kind


def test_a_model_without_blocks_has_nothing_to_recompute() -> None:
    with pytest.raises(ConfigError, match=r"FashionCNN has no ModuleList of blocks"):
        Plan(checkpointing="full").check(1, build_model("fashion-cnn"))
    with pytest.raises(ConfigError, match=r"goes through a graph twice"):
        Plan(pipeline=2, schedule="zbv", checkpointing="full")


def test_stages_hold_whole_blocks_to_recompute_or_are_refused_without_processes() -> None:
    model, inputs = Blocks(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), torch.randn(6, 8)
    found = Plan(pipeline=3, microbatches=3).check(3, model, inputs).cuts
    assert [cut.names for cut in found] == [("blocks.0.0",), ("blocks.0.1",), ("head",)]
    for plan in (
        Plan(pipeline=2, microbatches=2, checkpointing="full"),
        Plan(pipeline=2, microbatches=2, compile=True),
    ):
        assert [cut.names for cut in plan.check(2, model, inputs).cuts] == [("blocks.0",), ("head",)]
        with pytest.raises(ConfigError, match=r"2 stages at most, .* 3 .* and blocks that .* keep whole\. Lower"):
            replace(plan, pipeline=3, microbatches=3).check(3, model, inputs)
    with pytest.raises(ConfigError, match=r"FashionCNN has no ModuleList .* or set parallel\.compile=false"):
        plan.check(2, build_model("fashion-cnn"), example("fashion-cnn"))
