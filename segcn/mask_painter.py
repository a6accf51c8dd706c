"""The mask painter: a canvas in the browser whose value is the raw class ids."""

from pathlib import Path

import anywidget
import numpy as np
from ipywidgets.widgets.trait_types import CByteMemoryView
from traitlets import Int, List

from segcn.errors import UserError
from segcn.labels import IGNORE, Palette

HERE = Path(__file__).parent
UNLABELLED = ("unlabelled", "unlabeled")


class MaskPainter(anywidget.AnyWidget):
    """Brush, fill, eraser, undo and the classes of a palette over a mask; `mask` is what stands on it now."""

    _esm = HERE / "mask_painter.js"
    _css = HERE / "mask_painter.css"
    ids = CByteMemoryView().tag(sync=True, echo_update=False)  # traitlets.Bytes refuses what a browser sends
    width = Int().tag(sync=True)
    height = Int().tag(sync=True)
    labels: List[dict] = List().tag(sync=True)
    eraser = Int(IGNORE).tag(sync=True)

    def __init__(self, palette: Palette):
        super().__init__(labels=legend(palette), eraser=erased(palette)[0])
        self.on_msg(self._painted)

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 [H, W], a copy; UserError where none was loaded."""
        if not self.ids:
            raise UserError("there is no mask yet: choose one of the data set, or a file")
        return np.frombuffer(self.ids, np.uint8).reshape(self.height, self.width).copy()

    def load(self, mask: np.ndarray) -> None:
        """Show class ids, uint8 [H, W]; what stood there is one undo away if it has their size."""
        with self.hold_sync():
            self.height, self.width = mask.shape
            self.ids = mask.tobytes()

    def _painted(self, _, content: dict, buffers: list) -> None:
        """A change made in the browser; nothing is sent back, since more may have been painted by now."""
        expected = ("painted", self.height, self.width)
        if (content.get("kind"), content.get("height"), content.get("width")) != expected:
            return  # painted on a mask that is not shown any more
        if len(buffers) == 1 and len(buffers[0]) == self.height * self.width:
            self.set_state({"ids": memoryview(bytes(buffers[0]))})


def legend(palette: Palette) -> list[dict]:
    """Every class, then what the eraser leaves: id, name and colour, as the ControlNet sees it."""
    classes = [(label.id, label.name) for label in palette.labels if not label.ignore]
    entries = dict([*classes, erased(palette)])
    return [{"id": id, "name": name, "colour": palette.table[id].tolist()} for id, name in entries.items()]


def erased(palette: Palette) -> tuple[int, str]:
    """Id and name of erased pixels: the class called unlabelled where there is one, else 255, under its own name."""
    for label in palette.labels:
        if not label.ignore and label.name.lower() in UNLABELLED:
            return label.id, label.name
    return IGNORE, next((label.name for label in palette.labels if label.ignore), UNLABELLED[0])
