"""Where a mask to paint on comes from: a row of the data set, a file by its path, or one that is uploaded."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import ipywidgets as w
import numpy as np

from segcn.config import SampleConfig
from segcn.dataset import read_control_mask
from segcn.errors import UserError
from segcn.records import Split

LISTED_ROWS = 500  # masks in the dropdown
STYLE = {"description_width": "60px"}


class MaskPicker(w.VBox):
    """Calls `use(mask, caption)` with what is chosen, uint8 [H, W] and None for a file, or `fail(error)`."""

    def __init__(
        self,
        split: Split,
        settings: SampleConfig,
        use: Callable[[np.ndarray, str | None], None],
        fail: Callable[[Exception], None],
    ):
        self.split, self.shape, self.use, self.fail = split, (settings.resolution, settings.fit), use, fail
        captions = [record.caption[:60] for record in split.records[:LISTED_ROWS]]
        options = [(f"{row}: {caption}", row) for row, caption in enumerate(captions)]
        self.row = w.Dropdown(options=options, description="mask", layout=w.Layout(width="392px"), style=STYLE)
        self.again = w.Button(description="Reload", tooltip="this row's mask as it is in the data set", layout=narrow())
        self.path = w.Text(
            description="or file", placeholder="a mask's path: class ids or palette colours", continuous_update=False,
            layout=w.Layout(width="392px"), style=STYLE,
        )  # fmt: skip
        self.upload = w.FileUpload(description="Upload", layout=narrow())
        self.row.observe(lambda _: self.pick(), "value")
        self.again.on_click(lambda _: self.pick())
        self.path.observe(lambda _: self.read_file(), "value")
        self.upload.observe(lambda _: self.receive(), "value")
        super().__init__([w.HBox([self.row, self.again]), w.HBox([self.path, self.upload])])

    def pick(self) -> None:
        """Use the chosen row's mask and caption."""
        record = self.split[self.row.value]
        self._use(record.mask, record.caption)

    def following(self, count: int) -> list[np.ndarray]:
        """The masks of the rows after the chosen one, at the end from the first on, as many as there are."""
        count = min(count, len(self.split) - 1)
        rows = [(self.row.value + 1 + k) % len(self.split) for k in range(count)]
        return [self._read(self.split[row].mask) for row in rows]

    def read_file(self) -> None:
        """Use the mask file whose path was typed."""
        if self.path.value.strip():
            self._use(Path(self.path.value.strip()).expanduser())

    def receive(self) -> None:
        """Use the mask file that was uploaded."""
        for file in self.upload.value[:1]:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "mask"
                path.write_bytes(file["content"])
                self._use(path, name=file["name"])
            self.upload.value = ()

    def _use(self, path: Path, caption: str | None = None, name: str | None = None) -> None:
        try:
            self.use(self._read(path), caption)
        except (UserError, OSError) as error:
            self.fail(UserError(str(error).replace(str(path), name)) if name else error)

    def _read(self, path: Path) -> np.ndarray:
        return read_control_mask(path, self.split.palette, *self.shape)


def narrow() -> w.Layout:
    """The width of a short field."""
    return w.Layout(width="112px")
