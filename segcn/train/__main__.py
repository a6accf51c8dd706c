"""`accelerate launch -m segcn.train`: one training process, with the flags of diffusers' train_controlnet.py."""

import sys

from segcn.train.config import TrainConfig
from segcn.utils.args import main_guard, parse


def main() -> None:
    """Read the command line, then import what trains."""
    config = parse(TrainConfig, sys.argv[1:], "accelerate launch -m segcn.train")
    from segcn.train.loop import train

    train(config)


if __name__ == "__main__":
    main_guard(main)
