"""What each rank does under horovodrun: ``horovod_train.py RECIPE OUT``, a whole run as the command line makes it."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent.parent))

from efftrain.config import load_recipe
from efftrain.parallel import ClusterRecipe, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_recipe(ClusterRecipe, Path(sys.argv[1]), ["parallel.backend=horovod"]), out=Path(sys.argv[2]))
