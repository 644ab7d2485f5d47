"""Pretrain on nine people, fine-tune for the tenth on an emulated watch. See README.md."""

import argparse

import numpy as np
import torch
from torch.nn import functional as F

from efftrain.data.watch import PEOPLE, Standardizer, load_watch
from efftrain.models.watch_cnn import WatchCNN
from efftrain.ondevice import Scheme, compile

EPOCHS = 15


def main() -> None:  # noqa: D103
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--person", type=int, default=1, choices=PEOPLE, help="who is left out of the pretraining")
    parser.add_argument("--scheme", default="sparse", help="a preset (none, ..., full) or a TOML file")
    parser.add_argument("--board", default="stm32f746")
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--out", help="folder for the generated C")
    options = parser.parse_args()
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
        print(f"\rpretraining on {len(PEOPLE) - 1} people: epoch {epoch + 1} of 12", end="", flush=True)
    scheme = Scheme.load(options.scheme) if options.scheme.endswith(".toml") else options.scheme
    samples, rate = x[::9].numpy(), options.lr
    program = compile(model, x[:1], scheme=scheme, board=options.board, calibration=samples, learning_rate=rate)
    print("\n" + program.plan.table())
    tune, test = watch.select(options.person, "first30"), watch.select(options.person, "rest70")
    samples, unseen = (program.quantize_input(scale.apply(part.inputs)) for part in (tune, test))
    board, simulator, rng = program.board(), program.simulator(), np.random.default_rng(0)
    before = board.evaluate(unseen, test.targets)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(samples))
        for engine in (board, simulator):
            engine.set_lr_shift(3 * epoch // EPOCHS)
            engine.train(samples, tune.targets, order)
        print(f"\rfine-tuning on the board: epoch {epoch + 1} of {EPOCHS}", end="", flush=True)
    after, equal = board.evaluate(unseen, test.targets), board.state() == simulator.state()
    print(f"\naccuracy on person {options.person}: {before:.1%} before, {after:.1%} after, {len(samples)} windows")
    print(f"RAM: {program.plan.total_ram_bytes:,} B planned, {board.measured_ram_bytes:,} B measured; {equal=}")
    if options.out:
        print(f"C99 in {program.write(options.out)}")


if __name__ == "__main__":
    main()
