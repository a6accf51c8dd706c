"""A sweep over guidance and control strength: its points, what each painted, and one picture of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from segcn.errors import UserError
from segcn.evaluate import faithfulness
from segcn.masks import colourise
from segcn.records import Split, read_split
from segcn.segmenter import Segmenter
from segcn.show import grid, read_pair, side_by_side


@dataclass(frozen=True)
class Point:
    """One setting of notebook 04, and the folder that it paints into."""

    guidance_scale: float
    controlnet_conditioning_scale: float
    folder: Path

    @property
    def parameters(self) -> dict[str, float | str]:
        """As notebook 04 takes them."""
        weights = {name: getattr(self, name) for name in ("guidance_scale", "controlnet_conditioning_scale")}
        return weights | {"output_dir": str(self.folder)}

    def painted(self, limit: int) -> Split:
        """The first images that it painted."""
        return read_split(self.folder / "generated").first(limit)


def points(guidance_scales: str, controlnet_conditioning_scales: str, folder: Path) -> list[Point]:
    """Every pair of two lists such as "1,1.5,4", the guidance first; UserError for what is no number above 0."""
    lists = {"guidance_scales": guidance_scales, "controlnet_conditioning_scales": controlnet_conditioning_scales}
    guidances, strengths = (_numbers(name, text) for name, text in lists.items())
    return [Point(one, other, folder / f"guidance-{one:g}-mask-{other:g}") for one in guidances for other in strengths]


def scores(swept: Sequence[Point], segmenter: Segmenter, limit: int) -> list[float]:
    """mIoU of each point's images against the masks that they were painted from."""
    return [faithfulness(point.painted(limit), segmenter)["miou"] for point in swept]


def picture(swept: Sequence[Point], found: Sequence[float], row: int = 0) -> Figure:
    """The same row at every point, guidance downward and the weight of the mask to the right, each with its mIoU."""
    columns = len({point.controlnet_conditioning_scale for point in swept})
    cells = [read_pair(point.painted(row + 1), row)[0] for point in swept]
    texts = [f"mIoU {value:.3f}" + (", the highest" if value == max(found) else "") for value in found]
    lines = range(0, len(swept), columns)
    heads = [f"mask weight {point.controlnet_conditioning_scale:g}" for point in swept[:columns]]
    left = [f"guidance {swept[at].guidance_scale:g}" for at in lines]
    return grid(
        [cells[at : at + columns] for at in lines], heads, left, [texts[at : at + columns] for at in lines], 1.9
    )


def wanted(real: Split, resolution: int, fit: str) -> Figure:
    """Mask and real image of the first row, the one that `picture` shows."""
    image, mask = read_pair(real, 0, resolution, fit)
    return grid([[side_by_side(colourise(mask, real.palette), image)]], below=[[real[0].caption]], width=3.8)


def _numbers(name: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise UserError(f"{name}: expected numbers above 0 as in 1,1.5,4, found {text!r}")
    return found
