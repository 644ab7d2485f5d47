"""``python -m efftrain``, for launchers that start modules: torchrun -m efftrain train RECIPE."""

from efftrain.cli.main import main

if __name__ == "__main__":
    main()
