"""The canvas of the panel, and where its masks come from: rows of a data set, files, photos, or a blank one."""

import io
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import anywidget
import ipywidgets as w
import numpy as np
from ipywidgets.widgets.trait_types import CByteMemoryView
from PIL import Image, ImageOps
from traitlets import Int, List, Unicode

from segcn.data.files import read_image
from segcn.data.masks import count_ids, read_mask, write_mask
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.generate.config import SampleConfig
from segcn.utils.errors import UserError

HERE = Path(__file__).parent
UNLABELLED = ("unlabelled", "unlabeled")
LISTED_ROWS = 500  # masks in the dropdown


class MaskCanvas(anywidget.AnyWidget):
    """A canvas in the browser with drawing tools, undo and the classes of a palette; `mask` is what it shows.

    changed: called after each change of mask or photo. wanted: called on Ctrl+Enter in the panel around it.
    """

    _esm = HERE / "mask_canvas.js"
    _css = HERE / "mask_canvas.css"
    ids = CByteMemoryView().tag(sync=True, echo_update=False)  # traitlets.Bytes refuses what a browser sends
    width = Int().tag(sync=True)
    height = Int().tag(sync=True)
    photo = CByteMemoryView().tag(sync=True)  # a PNG of the mask's size that shows through it
    labels: List[dict] = List().tag(sync=True)
    eraser = Int(IGNORE).tag(sync=True)

    def __init__(self, palette: Palette, changed: Callable[[], None], wanted: Callable[[], None]):
        super().__init__(labels=canvas_labels(palette), eraser=erased(palette)[0])
        self.palette, self.changed, self.wanted = palette, changed, wanted
        self.under: np.ndarray | None = None  # the photo, uint8 [H, W, 3]
        self.on_msg(self._receive)

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 [H, W], a copy; UserError where none was loaded."""
        if not self.ids:
            raise UserError("there is no mask yet: choose one of the data set, or a file")
        return np.frombuffer(self.ids, np.uint8).reshape(self.height, self.width).copy()

    def load(self, mask: np.ndarray) -> None:
        """Show class ids, uint8 [H, W]; the mask before is one undo away if it has their size."""
        with self.hold_sync():
            self.height, self.width = mask.shape
            self.ids = mask.tobytes()
        self.changed()

    def lay_under(self, photo: np.ndarray | None) -> None:
        """Show a photo, uint8 [H, W, 3], through the mask, made to fit it by cropping; None: none any more."""
        self.under, file = None, io.BytesIO()
        if photo is not None:
            fitted = ImageOps.fit(Image.fromarray(photo), (self.width, self.height))
            fitted.save(file, format="PNG")
            self.under = np.array(fitted)
        self.photo = file.getvalue()
        self.changed()

    def download(self, name: str, content: bytes) -> None:
        """Hand a file to the browser, which saves it."""
        self.send({"kind": "download", "name": name}, buffers=[content])

    def download_mask(self) -> None:
        """The mask as an indexed PNG: its values are the class ids, its palette the colors."""
        file = io.BytesIO()
        write_mask(file, self.mask, self.palette)
        self.download("mask.png", file.getvalue())

    def _receive(self, _, content: dict, buffers: list) -> None:
        """A change made in the browser; nothing is sent back, since more may have been drawn by now."""
        if content.get("kind") == "generate":
            return self.wanted()
        expected = ("drawn", self.height, self.width)
        if (content.get("kind"), content.get("height"), content.get("width")) != expected:
            return None  # drawn on a mask that is not shown any more
        if len(buffers) == 1 and len(buffers[0]) == self.height * self.width:
            self.set_state({"ids": memoryview(bytes(buffers[0]))})
            self.changed()
        return None


def canvas_labels(palette: Palette) -> list[dict]:
    """Every class, then what the eraser leaves: id, name and color, as the ControlNet sees it."""
    classes = [(label.id, label.name) for label in palette.labels if not label.ignore]
    entries = dict([*classes, erased(palette)])
    return [{"id": id, "name": name, "color": palette.table[id].tolist()} for id, name in entries.items()]


def erased(palette: Palette) -> tuple[int, str]:
    """Id and name of erased pixels: the class called unlabelled where there is one, else 255, under its own name."""
    for label in palette.labels:
        if not label.ignore and label.name.lower() in UNLABELLED:
            return label.id, label.name
    return IGNORE, next((label.name for label in palette.labels if label.ignore), UNLABELLED[0])


def button(text: str, press: Callable[[], None], width: str = "auto", **more) -> w.Button:
    """A button that calls `press`."""
    made = w.Button(description=text, layout=w.Layout(width=width), **more)
    made.on_click(lambda _: press())
    return made


def read_at(path: Path, palette: Palette, settings: SampleConfig) -> np.ndarray:
    """A mask file as class ids, uint8 [H, W], as large as the settings say."""
    if settings.resolution is None:
        return read_mask(path, palette)
    from segcn.data.dataset import read_framed_mask  # with torch, which takes seconds to be imported

    return read_framed_mask(path, palette, settings.resolution, settings.framing)[0]


class FileButton(anywidget.AnyWidget):
    """A button that asks for a file, whose name and content `use` gets. (A FileUpload adds a count to its name.)"""

    _esm = """
    function render({ model, el }) {
      const [name, title] = [model.get("description"), model.get("tooltip")];
      const file = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", hidden: true });
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name, title });
      button.className = "jupyter-widgets jupyter-button widget-button";
      button.style.width = "auto";
      button.addEventListener("click", () => file.click());
      file.addEventListener("change", async () => {
        const [chosen] = file.files;
        if (chosen) model.send({ name: chosen.name }, undefined, [await chosen.arrayBuffer()]);
        file.value = "";
      });
      el.append(button, file);
    }
    export default { render };
    """
    description = Unicode().tag(sync=True)

    def __init__(self, description: str, tooltip: str, use: Callable[[str, bytes], None]):
        super().__init__(description=description, tooltip=tooltip)
        self.on_msg(lambda _, content, buffers: use(content["name"], bytes(buffers[0])))


class MaskPicker(w.HBox):
    """Puts masks on the canvas: of a row (`use` gets its caption), of a file, or a blank one; and a photo beneath.

    fail(error): called for a file that cannot be used. `again`, `path` and `size` are to be shown by the panel.
    """

    def __init__(self, split: Split, settings: SampleConfig, canvas: MaskCanvas, use: Callable, fail: Callable):
        self.split, self.settings, self.canvas, self.use, self.fail = split, settings, canvas, use, fail
        captions = [record.caption[:60] for record in split.records[:LISTED_ROWS]]
        options = [(f"{row}: {caption}", row) for row, caption in enumerate(captions)]
        slim = {"style": {"description_width": "auto"}}
        self.row = w.Dropdown(options=options, description="mask", layout=w.Layout(flex="1", min_width="96px"), **slim)
        self.again = button("Reload", self.pick, tooltip="this row's mask as it is in the data set")
        classes = [(entry["name"], entry["id"]) for entry in canvas.labels]
        self.background = w.Dropdown(options=classes, layout=w.Layout(width="92px"), tooltip="class of a blank mask")
        self.blank = button("New mask of", self.clean, tooltip="a mask of one class: the one chosen beside")
        self.size = w.BoundedIntText(min=8, max=4096, step=8, continuous_update=False)
        hint = "a mask's path: class ids or palette colors"
        self.path = w.Text(description="mask file", placeholder=hint, continuous_update=False)
        self.upload = FileButton("Import", "a mask file: class ids or palette colors", self._read_upload)
        beneath = "a photo to draw on: it shows through the mask, and the segmenter can make a mask of it"
        self.photo = FileButton("Photo", beneath, self._read_photo)
        self.row.observe(lambda _: self.pick(), "value")
        self.path.observe(lambda _: self._read_path(), "value")
        save = button("Download", canvas.download_mask, tooltip="the mask as an indexed PNG of class ids")
        super().__init__([self.row, self.blank, self.background, self.upload, save, self.photo])
        self.layout.flex_flow, self.layout.width = "row wrap", "calc(var(--side) + var(--pane) + 10px)"

    def pick(self) -> None:
        """Use the chosen row's mask and caption."""
        record = self.split[self.row.value]
        with self.failing():
            mask = read_at(record.mask, self.split.palette, self.settings)
            self.background.value, self.size.value = int(count_ids(mask)[:IGNORE].argmax()), max(mask.shape)
            self.use(mask, record.caption)

    def clean(self) -> None:
        """Use a square mask of one class."""
        self.use(np.full((self.size.value, self.size.value), self.background.value, np.uint8), None)

    def following(self, count: int) -> list[np.ndarray]:
        """The masks of the rows after the chosen one, at the end from the first on, as many as there are."""
        rows = [(self.row.value + 1 + k) % len(self.split) for k in range(min(count, len(self.split) - 1))]
        return [read_at(self.split[row].mask, self.split.palette, self.settings) for row in rows]

    @contextmanager
    def failing(self, path: Path | None = None, name: str = ""):
        """Tell of an error in the block; name: of the user's own file, where `path` is a temporary copy of it."""
        try:
            yield
        except (UserError, OSError) as error:
            self.fail(UserError(str(error).replace(str(path), name)) if path else error)

    def _read_path(self) -> None:
        if self.path.value.strip():
            with self.failing():
                path = Path(self.path.value.strip()).expanduser()
                self.use(read_at(path, self.split.palette, self.settings), None)

    def _read_upload(self, name: str, content: bytes) -> None:
        with self._copied(name, content) as path:
            self.use(read_at(path, self.split.palette, self.settings), None)

    def _read_photo(self, name: str, content: bytes) -> None:
        with self._copied(name, content) as path:
            self.canvas.lay_under(read_image(path))

    @contextmanager
    def _copied(self, name: str, content: bytes):
        """A copy of a file that was chosen in the browser."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            with self.failing(path, name):
                yield path
