"""`segcn samples`: the sample data, the embedded base, its figures, and images of what fails."""

import argparse
from pathlib import Path

from segcn.utils.args import parse
from segcn.utils.paths import OUTPUTS

PICTURES = {
    "landscapes": "procedural landscapes with exact masks and captions",
    "earth": "real places in three styles with MODIS land cover; needs pip install 'segcn[samples]'",
}


def command(words: list[str]) -> None:
    """Read the words behind `segcn samples`, and do what they say."""
    if words[:1] == ["measure"]:
        return measure_base(words[1:])
    options = vars(arguments().parse_args(words))
    kind = options.pop("kind")
    if kind == "landscapes":
        from segcn.samples.landscapes.scene import write_landscapes

        write_landscapes(**options)
    elif kind == "earth":
        from segcn.samples.earth import write_earth

        write_earth(**options)
    elif kind == "sd15":
        from segcn.samples.base_model.recipe import build_sd15

        build_sd15(**options)
    elif kind == "failures":
        from segcn.samples.landscapes.scene import sample_landscapes
        from segcn.samples.measure import write_failures

        write_failures(**options, dataset=sample_landscapes())
    else:
        from segcn.samples.base_model.recipe import SMOKE, BaseRecipe, build_base

        build_base(options["work"], options["out"], SMOKE if options["smoke"] else BaseRecipe())


def measure_base(words: list[str]) -> None:
    """`segcn samples measure`."""
    from segcn.data.metadata import read_split
    from segcn.data.visualize import quiet
    from segcn.samples.config import MeasureConfig
    from segcn.samples.landscapes.scene import sample_landscapes
    from segcn.samples.measure import measure

    quiet()
    config = parse(MeasureConfig, words, "segcn samples measure")
    measure(config, read_split(sample_landscapes(), "train"))


def arguments() -> argparse.ArgumentParser:
    """Of every kind of sample but `measure`, which has a dataclass."""
    parser = argparse.ArgumentParser(prog="segcn samples", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, text in PICTURES.items():
        samples = kinds.add_parser(name, help=text)
        samples.add_argument("out", type=Path)
        samples.add_argument("--count", type=int, default=1024, help="rows (of the train split, with --test)")
        samples.add_argument("--resolution", type=int, default=128, help="pixels a side")
        samples.add_argument("--seed", type=int, default=0)
        samples.add_argument("--test", type=int, help="rows of a test split: writes OUT/train and OUT/test")
    base = kinds.add_parser("base", help="train the embedded base model: hours on a CPU; resumes")
    base.add_argument("out", type=Path, help="model folder to write")
    base.add_argument("--work", type=Path, default=OUTPUTS / "base", help="where its training state is kept")
    base.add_argument("--smoke", action="store_true", help="three steps of everything, to see that it runs")
    sd15 = kinds.add_parser("sd15", help="write a base of Stable Diffusion 1.5's size with random weights, to time")
    sd15.add_argument("out", type=Path, help="model folder to write, 4.3 GB")
    sd15.add_argument("--seed", type=int, default=0)
    failures = kinds.add_parser("failures", help="draw what the usual failures look like, provoked on the landscapes")
    failures.add_argument("out", type=Path, help="PNG to write")
    failures.add_argument("--work", type=Path, default=OUTPUTS / "failures", help="where its ControlNets are trained")
    kinds.add_parser("measure", help="measure the embedded base and its ControlNet on held-out images")
    return parser
