"""torchrun --nproc-per-node 2 parallel/train.py parallel/recipes/watch_ddp_topk.toml

The same as ``efftrain train RECIPE``, as a file that torchrun can start.
"""

import sys

from efftrain.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
