"""Pretrain on nine people, fine-tune for the tenth on an emulated watch. See README.md."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from efftrain.data.watch import PEOPLE, Standardizer, load_watch
from efftrain.errors import EfftrainError
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Board, Scheme, compile

EPOCHS = 15


def main() -> int:  # noqa: D103
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--person", type=int, default=1, choices=PEOPLE, help="who is left out of the pretraining")
    parser.add_argument("--scheme", default="sparse", help="a preset (none, ..., full), last_k=K or a TOML file")
    parser.add_argument("--board", default="stm32f746", help="a name (stm32f746, nrf52840) or a TOML file")
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--out", help="folder for the generated C")
    try:
        run(parser.parse_args())
    except (EfftrainError, OSError) as error:
        print(f"finetune: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Everything; what the user can have mistyped is checked before the minute of training."""
    scheme = Scheme.parse(options.scheme)
    target = Board.load(options.board) if options.board.endswith(".toml") else Board.named(options.board)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    watch = load_watch()
    others = watch.select([p for p in PEOPLE if p != options.person])
    scale = Standardizer.fit(others.inputs)
    x, y = torch.from_numpy(scale.apply(others.inputs)), torch.from_numpy(np.array(others.targets))
    model = WatchCNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(12):
        for batch in torch.split(torch.randperm(len(x)), 32):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
        progress(f"pretraining on {len(PEOPLE) - 1} people", epoch + 1, 12)
    samples, rate = x[::9].numpy(), options.lr
    program = compile(model, x[:1], scheme=scheme, board=target, calibration=samples, learning_rate=rate)
    print(program.plan.table())
    tune, test = watch.select(options.person, "first30"), watch.select(options.person, "rest70")
    samples, unseen = (program.quantize_input(scale.apply(part.inputs)) for part in (tune, test))
    board, simulator, rng = program.board(), program.simulator(), np.random.default_rng(0)
    before = board.evaluate(unseen, test.targets)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(samples))
        for engine in (board, simulator):
            engine.set_lr_shift(3 * epoch // EPOCHS)
            engine.train(samples, tune.targets, order)
        progress("fine-tuning on the board", epoch + 1, EPOCHS)
    after, equal = board.evaluate(unseen, test.targets), board.state() == simulator.state()
    print(f"accuracy on person {options.person}: {before:.1%} before, {after:.1%} after, {len(samples)} windows")
    print(f"RAM: {program.plan.total_ram_bytes:,} B planned, {board.measured_ram_bytes:,} B measured; {equal=}")
    reserved, touched = program.plan.stack_bytes, board.measured_stack_bytes
    print(f"     planned reserves {reserved:,} B of stack, {touched:,} B were touched")
    if options.out:
        print(f"C99 in {program.write(options.out)}")


def progress(what: str, epoch: int, epochs: int) -> None:
    """One line that is written over on a terminal, a line per epoch in a file."""
    start, end = ("\r", "" if epoch < epochs else "\n") if sys.stdout.isatty() else ("", "\n")
    print(f"{start}{what}: epoch {epoch} of {epochs}", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
