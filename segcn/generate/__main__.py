"""`accelerate launch -m segcn.generate`: one process of `segcn generate`."""

import sys
from pathlib import Path

from segcn.generate.config import GenerateConfig
from segcn.utils.args import main_guard, parse, stoppable
from segcn.utils.io import this_process


def generate_share_of_process(config: GenerateConfig) -> Path | None:
    """Generate the share of this process; returns the data set in the first one."""
    from segcn.generate.writer import generate_dataset, reconstruct_controls

    process = this_process()
    if config.reconstruct:
        return reconstruct_controls(config) if process.rank == 0 else None
    out = generate_dataset(config, process=process)
    return out if process.rank == 0 else None


def main() -> None:
    """Read the command line, then import what generates."""
    config = parse(GenerateConfig, sys.argv[1:], "accelerate launch -m segcn.generate")
    with stoppable():
        out = generate_share_of_process(config)
    if out:
        print(out)


if __name__ == "__main__":
    main_guard(main)
