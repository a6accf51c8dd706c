"""The panel of notebook 04: pick a mask, write a prompt, paint, save. Its logic runs headless too."""

import csv
import dataclasses
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import numpy as np
from PIL import Image

from segcn.arguments import make
from segcn.config import SampleConfig
from segcn.dataset import read_control_mask
from segcn.errors import UserError
from segcn.labels import Palette
from segcn.masks import colourise, write_mask
from segcn.pipeline import Painter, generate
from segcn.records import COLUMNS, Split, read_split, write_metadata

SIDE = 320  # px of the panel's two pictures
LISTED_ROWS = 500  # masks in the dropdown
SAVING = threading.Lock()
DEFAULTS = make(SampleConfig, "tiny")


def paint_one(
    painter: Painter,
    mask: np.ndarray,
    prompt: str,
    settings: SampleConfig,
    on_step: Callable[[int], bool | None] | None = None,
) -> np.ndarray:
    """One mask, uint8 [H, W] class ids, and a prompt to one image, uint8 [H, W, 3].

    `on_step(step)` is called after each denoising step; True stops.
    """
    return generate(painter, mask[None], [prompt], [0], settings, on_step=on_step)[0]


def save_row(folder: str | Path, image: np.ndarray, mask: np.ndarray, caption: str, palette: Palette) -> int:
    """Append a row to a data set folder, which is a whole data set before and after; returns the row's number.

    Nothing that stands is overwritten. UserError if the caption is empty or the folder is another data set.
    """
    folder = Path(folder)
    if not caption.strip():
        raise UserError("a row of a data set needs a caption: write a prompt before saving")
    with SAVING:
        rows = _rows_of(folder, palette)
        number = _claim(folder)
        names = f"images/{number:06d}.png", f"masks/{number:06d}.png"
        _replace(folder / names[1], lambda path: write_mask(path, mask, palette))
        _replace(folder / names[0], lambda path: Image.fromarray(image).save(path, format="PNG"))
        write_metadata(folder, [*rows, (*names, caption)])
    return len(rows)


def _rows_of(folder: Path, palette: Palette) -> list[tuple[str, str, str]]:
    """The rows that stand in `folder`, which is made with its palette if it is new."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata = folder / "metadata.csv"
    if not metadata.is_file():
        if (folder / "metadata.jsonl").is_file():
            raise UserError(f"{folder}: expected metadata.csv, found metadata.jsonl; choose another folder")
        palette.save(folder / "palette.json")
        return []
    header = next(csv.reader(io.StringIO(metadata.read_text(encoding="utf-8-sig"))))
    if tuple(header) != COLUMNS:
        raise UserError(f"{metadata}: expected the columns {','.join(COLUMNS)}, found {','.join(header)}")
    split = read_split(folder)
    if split.palette.fingerprint != palette.fingerprint:
        raise UserError(f"{folder}: its palette differs from the mask's; choose another folder")
    return [
        (record.image.relative_to(folder).as_posix(), record.mask.relative_to(folder).as_posix(), record.caption)
        for record in split.records
    ]


def _claim(folder: Path) -> int:
    """The first number above all that are taken, reserved by its empty mask file."""
    taken = [int(path.stem) for name in ("images", "masks") for path in (folder / name).glob("[0-9]*.png")]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (folder / "masks" / f"{number:06d}.png").open("xb").close()
            return number
        except FileExistsError:
            number += 1


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    aside = path.with_name(f".{path.stem}.staged")
    write(aside)
    os.replace(aside, path)


def png(picture: np.ndarray, side: int = SIDE, smooth: bool = True) -> bytes:
    """A picture, uint8 [H, W, 3], as PNG of `side` pixels in height; without `smooth` pixels stay squares."""
    image, kept = Image.fromarray(picture), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    file = io.BytesIO()
    image.resize((max(1, round(image.width * side / image.height)), side), kept).save(file, format="PNG")
    return file.getvalue()


class Panel(w.VBox):
    """Mask row, prompt and settings on the left, mask and painted image beside each other, state below."""

    def __init__(self, painter: Painter, split: Split, save_dir: str | Path, defaults: SampleConfig):
        self.painter, self.split, self.save_dir = painter, split, Path(save_dir)
        self.painted: tuple[np.ndarray, np.ndarray, str] | None = None  # image, mask and prompt that belong together
        self.worker: threading.Thread | None = None
        self.stopped = threading.Event()
        self.defaults = defaults
        self._make_controls(defaults)
        self._connect()
        super().__init__([w.HBox([self._settings_box(), w.HBox([self.mask_view, self.image_view])]), self._state_box()])
        self.pick()

    def _make_controls(self, defaults: SampleConfig) -> None:
        wide, style = w.Layout(width="380px"), {"description_width": "100px"}
        captions = [record.caption[:60] for record in self.split.records[:LISTED_ROWS]]
        options = [(f"{row}: {caption}", row) for row, caption in enumerate(captions)]
        shared = {"layout": wide, "style": style, "continuous_update": False}
        self.row = w.Dropdown(options=options, description="mask", layout=wide, style=style)
        self.prompt = w.Textarea(description="prompt", layout=w.Layout(width="380px", height="80px"), style=style)
        self.steps = w.IntSlider(defaults.num_inference_steps, 1, 100, description="steps", **shared)
        self.guidance = w.FloatSlider(
            defaults.guidance_scale, min=1, max=15, step=0.5, description="guidance", **shared
        )
        self.strength = w.FloatSlider(
            defaults.controlnet_conditioning_scale, min=0, max=2, step=0.05, description="mask weight", **shared
        )
        self.seed = w.BoundedIntText(defaults.seed, 0, 2**31 - 1, description="seed", layout=wide, style=style)
        self.generate_button = w.Button(description="Generate", button_style="primary")
        self.stop_button = w.Button(description="Stop", disabled=True)
        self.save_button = w.Button(description="Save", disabled=True)
        self.progress = w.IntProgress(0, 0, 1, layout=w.Layout(width="300px"))
        self.status = w.Label("Pick a mask, change the prompt, press Generate.")
        blank = png(np.full((8, 8, 3), 235, np.uint8))
        self.mask_view, self.image_view = (w.Image(value=blank, format="png") for _ in range(2))

    def _connect(self) -> None:
        self.row.observe(lambda _: self.pick(), "value")
        self.generate_button.on_click(lambda _: self.generate())
        self.stop_button.on_click(lambda _: self.stopped.set())
        self.save_button.on_click(lambda _: self.save())

    def _settings_box(self) -> w.VBox:
        buttons = w.HBox([self.generate_button, self.stop_button, self.save_button])
        return w.VBox([self.row, self.prompt, self.steps, self.guidance, self.strength, self.seed, buttons])

    def _state_box(self) -> w.HBox:
        return w.HBox([self.progress, self.status])

    def pick(self) -> None:
        """Show the chosen row's mask and put its caption into the prompt."""
        record = self.split[self.row.value]
        try:
            self.mask = read_control_mask(record.mask, self.split.palette, self.defaults.resolution, self.defaults.fit)
        except UserError as error:
            self.status.value = f"Error: {error}"
            return
        self.mask_view.value = png(colourise(self.mask, self.split.palette), smooth=False)
        self.prompt.value = record.caption

    def settings(self) -> SampleConfig:
        """The sampling settings as the controls stand."""
        return dataclasses.replace(
            self.defaults,
            num_inference_steps=self.steps.value,
            guidance_scale=self.guidance.value,
            controlnet_conditioning_scale=self.strength.value,
            seed=self.seed.value,
        )

    def generate(self) -> None:
        """Start painting with the values as they stand now; the kernel stays free, so Stop is heard."""
        if self.worker is not None and self.worker.is_alive():
            return
        self.stopped.clear()
        self._busy(True)
        self.progress.value, self.progress.max = 0, self.steps.value
        self.status.value = "Painting ..."
        self.worker = threading.Thread(target=self._paint, args=(self.mask, self.prompt.value, self.settings()))
        self.worker.start()

    def _paint(self, mask: np.ndarray, prompt: str, settings: SampleConfig) -> None:
        try:
            image = paint_one(self.painter, mask, prompt, settings, self._on_step)
            if self.stopped.is_set():
                self.status.value = "Stopped."
            else:
                self.painted = image, mask, prompt
                self.image_view.value = png(image)
                self.status.value = f"Painted with seed {settings.seed}."
        except Exception as error:
            self.status.value = f"Error: {error}"
        finally:
            self._busy(False)

    def _on_step(self, step: int) -> bool:
        self.progress.value = step
        return self.stopped.is_set()

    def _busy(self, busy: bool) -> None:
        self.generate_button.disabled, self.stop_button.disabled = busy, not busy
        self.save_button.disabled = busy or self.painted is None

    def save(self) -> None:
        """Append the painted image, with the mask and prompt it was painted from, to the data set in `save_dir`."""
        if self.painted is None:
            self.status.value = "Nothing is painted yet: press Generate."
            return
        try:
            row = save_row(self.save_dir, *self.painted, self.split.palette)
            self.status.value = f"Saved as row {row} of {self.save_dir}."
        except (UserError, OSError) as error:
            self.status.value = f"Error: {error}"


def panel(painter: Painter, split: Split, save_dir: str | Path, defaults: SampleConfig = DEFAULTS) -> Panel:
    """The panel over a split's masks, its controls as in `defaults`; what is saved goes to the data set `save_dir`."""
    return Panel(painter, split, save_dir, defaults)
