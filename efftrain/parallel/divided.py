"""From a plan with more than one axis to the job of this rank: cut, divide, shard, and put together again."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from efftrain.parallel.axes import Axes, ManyAxes
from efftrain.parallel.backends import Transport
from efftrain.parallel.graph import part_of, tensors
from efftrain.parallel.layout import Layout
from efftrain.parallel.pipeline import Pipeline, holders, stages_of
from efftrain.parallel.recompute import compile_blocks, recompute
from efftrain.parallel.replicas import start_equal
from efftrain.parallel.sharded import Sharded
from efftrain.parallel.stages import StageCut, shared_parameters
from efftrain.parallel.sync import GradSync, SyncConfig
from efftrain.parallel.tensor import TensorPlan, divide
from efftrain.parallel.trial import try_divided
from efftrain.training import Exchange, Objective, SingleProcess, StepConfig, cross_entropy
from efftrain.training.compute import Compute, WholeModel

if TYPE_CHECKING:
    from efftrain.parallel.plan import Plan


def divided(
    plan: "Plan",
    model: nn.Module,
    layout: Layout,
    axes: Axes,
    *,
    objective: Objective,
    step: StepConfig,
    sync: SyncConfig,
) -> tuple[nn.Module, ManyAxes, Compute]:
    """What this rank trains, whom it talks to, and how it computes.

    Args:
        plan: Checked.
        model: The whole model, on the device of this rank, equal on all ranks; its parts are taken over.
        layout: Of the plan and the model.
        axes: The mesh of the plan.
        objective: Gives the mean loss of a batch.
        step: How one update is computed.
        sync: Of the data axis.
    """
    tensor_plan, cuts = layout.tensor, layout.cuts
    world = axes.world()
    start_equal(world, model)
    if tensor_plan is not None:
        if objective is not cross_entropy:  # the one that is known to take parts of the classes
            tensor_plan = tensor_plan.with_whole_output()
        try_divided(model, tensor_plan, axes)
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    if tensor_plan is not None and tensor_plan.divides_classes:
        around = loss_parallel
    classes = _Classes(tensor_plan, axes.mesh["tensor"]) if tensor_plan is not None else None
    counts = axes.place("tensor") == 0
    recompute(model, plan.checkpointing)  # after the cuts: what was traced is the model itself
    if plan.compile:
        compile_blocks(model)
    if plan.pipeline == 1:
        if tensor_plan is not None:
            divide(model, tensor_plan, axes.mesh["tensor"])
        if tensor_plan is not None or step.precision == "float8":
            model.register_forward_hook(_copy_views)
        exchange = ManyAxes(axes, _data_exchange(plan, axes, sync), world)
        whole_model = WholeModel(
            model,
            exchange,
            objective if classes is None else classes.objective(objective),
            micro_batches=step.micro_batches,
            precision=step.precision,
        )
        return model, exchange, _OneOfMany(whole_model, around, classes, counts)
    own = stages_of(axes.place("pipeline"), plan.pipeline, plan.schedule)
    part = part_of(model, {name for number in own for name in cuts[number].names})
    stages: dict[int, nn.Module] = {number: cuts[number].build(model) for number in own}
    if tensor_plan is not None:
        divide(part, tensor_plan, axes.mesh["tensor"])
        for stage in stages.values():
            stage.register_forward_hook(_copy_views)
    shared = _shared(plan, axes, model, cuts)
    _leave_to_others(model, part)
    exchange = ManyAxes(axes, _data_exchange(plan, axes, sync, list(stages.values())), world, shared)
    exchange.wrap(part)
    given = classes.objective(objective) if classes is not None else objective
    pipeline = Pipeline(
        part,
        stages,
        cuts,
        axes.mesh["pipeline"].get_group(),
        schedule=plan.schedule,
        num_micro_batches=plan.num_micro_batches,
        objective=lambda output, targets: given(_Given(output), torch.empty(0), targets),
        exchange=exchange,
        device=axes.device,
        num_parts=plan.tensor if plan.sequence else 1,
        bf16=step.precision == "bf16",
        around=around,
        whole=classes.whole if classes is not None else lambda output: output,
        counts=counts,
    )
    return part, exchange, pipeline


def _leave_to_others(model: nn.Module, part: nn.Module) -> None:
    """Free the weights of other stages: this rank never moves them, so they would be those of step 0 for ever."""
    own = {id(tensor) for _, tensor in tensors(part)}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in own:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in own:
                module._buffers[name] = buffer.to("meta")


def _shared(plan: "Plan", axes: Axes, model: nn.Module, cuts: Sequence[StageCut]) -> list[tuple[Tensor, Transport]]:
    """This rank's parameters that other ranks of its pipeline hold, too, and all that do."""
    pipeline = axes.transport("pipeline")
    found: list[tuple[Tensor, Transport]] = []
    for name, numbers in shared_parameters(model, cuts).items():
        ranks = holders(numbers, plan.pipeline, plan.schedule)
        if len(ranks) > 1 and pipeline.rank in ranks:
            found.append((model.get_parameter(name), pipeline.some(ranks)))
    return found


def _data_exchange(plan: "Plan", axes: Axes, sync: SyncConfig, stages: Sequence[nn.Module] = ()) -> Exchange:
    transport = axes.transport("data")
    if plan.shard != "none":
        mesh = axes.mesh["shard"] if axes.shard == axes.data else axes.mesh["replicate", "shard"]
        free_weights = plan.shard == "full"
        return Sharded(transport, mesh, codec=plan.codec, free_weights=free_weights, stages=stages, seed=sync.seed)
    if axes.data == 1:
        return SingleProcess()
    # Ranks of the tensor axis are neighbors, so a node has so many fewer of the data axis.
    sync = replace(sync, node_size=max(1, sync.node_size // axes.tensor))
    return GradSync(plan.codec, transport, sync)


class _Given(nn.Module):
    """Stands for a model whose output is there already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, _: Tensor) -> Tensor:
        return self._output


def _copy_views(_: nn.Module, __: object, output: Tensor) -> Tensor:
    """A part of a DTensor is a view, which torch's split backward passes cannot detach and ``fully_shard`` warns of."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


class _Classes:
    """A last layer that leaves each rank its part of the classes: the loss is computed on parts, too."""

    def __init__(self, plan: TensorPlan, mesh: DeviceMesh) -> None:
        self._divided, self._mesh = plan.divides_classes, mesh

    def objective(self, objective: Objective) -> Objective:
        """The same loss of a model whose outputs are parts."""

        def of_parts(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            loss = objective(_Whole(model, self._mesh) if self._divided else model, inputs, targets)
            return loss.to_local().clone() if isinstance(loss, DTensor) else loss

        return of_parts

    def whole(self, output: Tensor) -> Tensor:
        """All classes, for evaluation. Every rank of the tensor axis calls it."""
        return DTensor.from_local(output, self._mesh, [Shard(-1)]).full_tensor() if self._divided else output


class _Whole(nn.Module):
    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self._call, self._mesh = model.__call__, mesh

    def forward(self, inputs: Tensor) -> Tensor:
        return DTensor.from_local(self._call(inputs), self._mesh, [Shard(-1)])


class _OneOfMany:
    """A ``WholeModel`` whose layers are divided: one rank of the tensor axis speaks for all."""

    def __init__(
        self,
        inner: WholeModel,
        around: Callable[[], AbstractContextManager[object]],
        classes: _Classes | None,
        counts: bool,
    ) -> None:
        self.model = inner.model
        self._inner, self._around, self._classes, self._counts = inner, around, classes, counts

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See ``Compute``."""
        with self._around():
            loss = self._inner.backward(inputs, targets)
        return loss if self._counts else torch.zeros_like(loss)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor | None:
        """See ``Compute``."""
        logits = self._inner.logits(inputs)
        logits = logits if self._classes is None else self._classes.whole(logits)
        return logits if self._counts else None
