"""The mask painter: a canvas in the browser whose value is the raw class ids."""

import dataclasses
import io
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import anywidget
import ipywidgets as w
import numpy as np
from ipywidgets.widgets.trait_types import CByteMemoryView
from PIL import Image
from traitlets import Int, List

from segcn.data import visualize
from segcn.data.captions import variations
from segcn.data.dataset import read_control_mask
from segcn.data.masks import colorize
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Palette
from segcn.generate.config import SampleConfig
from segcn.generate.infer import GeneratedImage, Order, generate_each
from segcn.generate.pipeline import SCHEDULERS, Pipeline
from segcn.utils.args import make
from segcn.utils.errors import UserError

# --- mask_painter: The mask painter: a canvas in the browser whose value is the raw class ids.

HERE = Path(__file__).parent
UNLABELLED = ("unlabelled", "unlabeled")


class MaskPainter(anywidget.AnyWidget):
    """Brush, fill, eraser, undo and the classes of a palette over a mask; `mask` is what stands on it now."""

    _esm = HERE / "painter.js"
    _css = HERE / "painter.css"
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


# --- panel_settings: The panel's sampling settings as fields.

WIDTH = "400px"
STYLE = {"description_width": "104px"}
SEEDS = 2**31  # new seeds are drawn below it


class PanelSettings(w.VBox):
    """Prompt, settings, number of images and seed; what it does not show stays as in `defaults`."""

    def __init__(self, defaults: SampleConfig):
        self.defaults = defaults
        plain = {"layout": w.Layout(width=WIDTH), "style": STYLE}
        line = plain | {"continuous_update": False}  # sent when left, so before the button that is pressed next
        half = line | {"layout": w.Layout(width="196px")}  # fields: a slider forgets a number typed without Enter
        share = line | {"min": 0, "max": 1, "step": 0.05, "readout_format": ".0%"}
        self.prompt = w.Textarea(description="prompt", rows=3, **line)
        self.negative_prompt = w.Text(description="not wanted", placeholder="negative prompt", **line)
        self.steps = w.BoundedIntText(min=1, max=1000, description="steps", **half)
        self.guidance = w.BoundedFloatText(min=1, max=100, step=0.5, description="guidance", **half)
        self.strength = w.BoundedFloatText(min=0, max=100, step=0.1, description="mask weight", **half)
        self.number = w.BoundedIntText(1, min=1, max=16, description="images", **half)
        self.guidance_window = w.FloatRangeSlider(description="text acts", **share)
        self.window = w.FloatRangeSlider(description="mask acts", **share)
        self.scheduler = w.Dropdown(options=list(SCHEDULERS), description="scheduler", **plain)
        self.seed = w.BoundedIntText(max=2 * SEEDS, description="seed", layout=w.Layout(width="246px"), style=STYLE)
        self.lock = w.ToggleButton(layout=w.Layout(width="150px"), tooltip="a new seed a press, or this one")
        self.lock.observe(lambda _: self._name_lock(), "value")
        self._name_lock()
        self.show(defaults)
        pairs = (self.steps, self.number), (self.guidance, self.strength)
        texts, rows = [self.prompt, self.negative_prompt], [w.HBox(pair) for pair in pairs]
        windows, seed = [self.guidance_window, self.window], w.HBox([self.seed, self.lock])
        super().__init__([*texts, *rows, *windows, self.scheduler, seed])

    def settings(self) -> SampleConfig:
        """The settings as the controls stand; UserError where the mask would act in no step."""
        start, end = self.window.value
        if start == end:
            raise UserError(f"mask acts: expected some of the steps, found {start:.0%} to {end:.0%}; widen it")
        return dataclasses.replace(
            self.defaults,
            num_inference_steps=self.steps.value,
            guidance_scale=self.guidance.value,
            guidance_start=self.guidance_window.value[0],
            guidance_end=self.guidance_window.value[1],
            controlnet_conditioning_scale=self.strength.value,
            control_guidance_start=start,
            control_guidance_end=end,
            negative_prompt=self.negative_prompt.value,
            scheduler=self.scheduler.value,
            seed=self.seed.value,
        )

    def show(self, settings: SampleConfig) -> None:
        """Put other settings into the controls."""
        self.steps.value = settings.num_inference_steps
        self.guidance.value = settings.guidance_scale
        self.guidance_window.value = settings.guidance_start, settings.guidance_end
        self.strength.value = settings.controlnet_conditioning_scale
        self.window.value = settings.control_guidance_start, settings.control_guidance_end
        self.negative_prompt.value = settings.negative_prompt
        self.scheduler.value = settings.scheduler
        self.seed.value = settings.seed

    def renew_seed(self) -> None:
        """A new seed, unless it is locked."""
        if not self.lock.value:
            self.seed.value = secrets.randbelow(SEEDS)

    def _name_lock(self) -> None:
        self.lock.description = "locked" if self.lock.value else "new each time"
        self.lock.icon = "lock" if self.lock.value else "unlock"


# --- mask_picker: Where a mask to paint on comes from: a row of the data set, a file by its path, or one that is uploaded.

LISTED_ROWS = 500  # masks in the dropdown
PICKER_STYLE = {"description_width": "60px"}


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
        self.row = w.Dropdown(options=options, description="mask", layout=w.Layout(width="392px"), style=PICKER_STYLE)
        self.again = w.Button(description="Reload", tooltip="this row's mask as it is in the data set", layout=narrow())
        self.path = w.Text(
            description="or file", placeholder="a mask's path: class ids or palette colors", continuous_update=False,
            layout=w.Layout(width="392px"), style=PICKER_STYLE,
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


# --- gallery: The painted images: a grid of those of one press, and the way back to those of earlier ones.

HISTORY = 100  # presses that can be gone back to
VIEWS = ("image", "outlines", "classes", "mask")
ALONE, BESIDE = 360, 214  # px of an image's width


class Card(w.VBox):
    """One image with its caption and seed; Save and Use again call back with it."""

    def __init__(
        self,
        picture: GeneratedImage,
        side: int,
        save: Callable[["Card"], None],
        reuse: Callable[[GeneratedImage], None],
    ):
        self.picture, self.seen = picture, ""
        self.image = w.Image(layout=w.Layout(width=f"{side}px"))
        self.save_button = w.Button(description="Save", layout=w.Layout(width="auto", flex="1"))
        self.reuse_button = w.Button(description="Use again", layout=w.Layout(width="auto", flex="1"))
        self.save_button.on_click(lambda _: save(self))
        self.reuse_button.on_click(lambda _: reuse(picture))
        caption, seed = w.Label(picture.caption), w.Label(f"seed {picture.settings.seed}")
        caption.add_class("segcn-wrapped")
        seed.add_class("segcn-quiet")
        buttons = w.HBox([self.save_button, self.reuse_button])
        super().__init__([self.image, caption, seed, buttons], layout=w.Layout(width=f"{side + 14}px"))
        self.add_class("segcn-card")

    def look(self, view: str, palette: Palette) -> None:
        """Show the image, the borders of the classes over it, their colors over it, or the mask."""
        if view == self.seen:
            return
        image, mask, self.seen = self.picture.image, self.picture.mask, view
        if view == "outlines":
            image = visualize.outlined(image, mask)
        elif view == "classes":
            image = visualize.overlay(image, mask, palette)
        elif view == "mask":
            image = colorize(mask, palette)
        self.image.value = png(image)


class Gallery(w.VBox):
    """The cards of one press; `save(image)` returns the row it became, `reuse(image)` brings its order back."""

    def __init__(
        self,
        palette: Palette,
        save: Callable[[GeneratedImage], int],
        reuse: Callable[[GeneratedImage], None],
        tell: Callable[[str], None],
    ):
        self.palette, self.save, self.reuse, self.tell = palette, save, reuse, tell
        self.entries: list[list[Card]] = []
        self.shown, self.fresh, self.side = -1, True, ALONE
        self.view = w.ToggleButtons(options=VIEWS, style={"button_width": "84px"})
        self.back, self.forward = w.Button(description="Back"), w.Button(description="Forward")
        self.place = w.Label()
        self.save_all = w.Button(description="Save all")
        for button in (self.back, self.forward, self.save_all):
            button.layout.width = "84px"
        self.view.observe(lambda _: self._look(), "value")
        self.back.on_click(lambda _: self.turn_to(self.shown - 1))
        self.forward.on_click(lambda _: self.turn_to(self.shown + 1))
        self.save_all.on_click(lambda _: self._keep_all())
        self.grid = w.Box(layout=w.Layout(flex_flow="row wrap", grid_gap="10px"))
        self.grid.add_class("segcn-grid")
        bar = w.HBox(
            [self.view, self.back, self.forward, self.place, self.save_all],
            layout=w.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 8px"),
        )
        super().__init__([bar, self.grid])
        self.turn_to(-1)

    @property
    def cards(self) -> list[Card]:
        """Those that are shown."""
        return self.entries[self.shown] if self.entries else []

    def begin(self, count: int) -> None:
        """The next `count` images are those of a new press."""
        self.fresh, self.side = True, ALONE if count == 1 else BESIDE

    def add(self, picture: GeneratedImage) -> None:
        """Show an image as soon as it is painted; to someone who looks at an earlier press it waits in the history."""
        card = Card(picture, self.side, self.keep, self.reuse)
        watched = self.fresh or self.shown == len(self.entries) - 1
        if self.fresh:
            self.entries = [*self.entries[1 - HISTORY :], []]
            self.fresh = False
        self.entries[-1].append(card)
        self.turn_to(len(self.entries) - 1 if watched else self.shown)

    def turn_to(self, number: int) -> None:
        """Show the images of a press, counted from 0; one that is not there changes nothing."""
        self.shown = number if 0 <= number < len(self.entries) else self.shown
        self._look()
        self.grid.children = self.cards
        self.back.disabled, self.forward.disabled = self.shown <= 0, self.shown >= len(self.entries) - 1
        self.save_all.disabled = not self.cards
        self.place.value = f"{self.shown + 1} of {len(self.entries)}" if self.entries else "nothing painted yet"

    def keep(self, card: Card) -> None:
        """Save a card's image, once: a second press may be on its way."""
        if card.save_button.disabled:
            return
        try:
            row = self.save(card.picture)
        except (UserError, OSError) as error:
            self.tell(f"Error: {error}")
            return
        card.save_button.description, card.save_button.disabled = f"Row {row}", True

    def _keep_all(self) -> None:
        for card in self.cards:
            self.keep(card)

    def _look(self) -> None:
        for card in self.cards:
            card.look(self.view.value, self.palette)


def png(picture: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 3], as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


# --- widgets: The panel of notebook 04: paint a mask, write a prompt, see images, keep some. Under voila it is an app.

DEFAULTS = make(SampleConfig, "tiny")
SETTLING = 0.2  # s before a press reads the controls: JupyterLab's press can overtake a change made just before it
AT_ONCE = 4  # captions, or masks, beside each other


class Panel(w.VBox):
    """Mask painter on the left, settings and buttons on the right, images below; it paints in a thread of its own."""

    def __init__(self, painter: Pipeline, split: Split, save_dir: str | Path, defaults: SampleConfig):
        self.painter, self.split, self.save_dir = painter, split, Path(save_dir)
        self.worker: threading.Thread | None = None
        self.stopped = threading.Event()
        self.canvas, self.controls = MaskPainter(split.palette), PanelSettings(defaults)
        self.status, self.progress = w.Label(), w.IntProgress(layout=w.Layout(width="400px", height="12px"))
        self.status.add_class("segcn-wrapped")
        self.status.add_class("segcn-status")
        self.status.layout.width = "400px"
        self.gallery = Gallery(split.palette, self.save, self.reuse, self.tell)
        self.picker = MaskPicker(split, defaults, self.use, self.fail)
        self.picker.pick()
        left = w.VBox([self.picker, self.canvas])
        right = w.VBox([self.controls, *self._buttons(), self.progress, self.status])
        across = w.Layout(flex_flow="row wrap", grid_gap="8px 28px", align_items="flex-start")
        super().__init__([w.Box([left, right], layout=across), self.gallery])
        self.add_class("segcn-panel")
        self.tell("Paint on the mask, write a prompt, press Generate.")

    def _buttons(self) -> list[w.HBox]:
        self.generate_button = w.Button(description="Generate", button_style="primary")
        self.stop_button = w.Button(description="Stop", disabled=True)
        self.captions_button = w.Button(description="Same mask, four captions")
        self.masks_button = w.Button(description="Same caption, four masks")
        self.generate_button.on_click(lambda _: self.generate())
        self.stop_button.on_click(lambda _: self.stopped.set())
        self.captions_button.on_click(lambda _: self.four_captions())
        self.masks_button.on_click(lambda _: self.four_masks())
        pairs = (self.generate_button, self.stop_button), (self.captions_button, self.masks_button)
        for pair in pairs:
            for button in pair:
                button.layout.width = "196px"
        return [w.HBox(pair) for pair in pairs]

    def use(self, mask: np.ndarray, caption: str | None = None) -> None:
        """Put a mask, uint8 [H, W], on the canvas, and a caption into the prompt."""
        self.canvas.load(mask)
        if caption is not None:
            self.controls.prompt.value = caption
        self.tell(f"A mask of {mask.shape[1]} x {mask.shape[0]} pixels.")

    def reuse(self, picture: GeneratedImage) -> None:
        """Bring back what an image was painted from; Generate paints it again."""
        self.use(picture.mask, picture.caption)
        self.controls.show(picture.settings)
        self.controls.lock.value = True

    def tell(self, text: str) -> None:
        """Say something in the panel; never read as HTML."""
        self.status.value = text

    def fail(self, error: Exception) -> None:
        """Say what went wrong."""
        self.tell(f"Error: {error}")

    def generate(self) -> None:
        """Paint the mask and the prompt as they stand, image k with the k-th seed from the one that is shown on."""

        def orders(mask: np.ndarray, prompt: str, settings: SampleConfig) -> list[Order]:
            seeds = range(settings.seed, settings.seed + self.controls.number.value)
            return [(mask, prompt, dataclasses.replace(settings, seed=seed)) for seed in seeds]

        self._start(orders)

    def four_captions(self) -> None:
        """Paint the mask with the prompt and three others, all from the same noise."""
        others = [record.caption for record in self.split.records]
        self._start(lambda mask, prompt, settings: [
            (mask, text, settings) for text in variations(prompt, others, AT_ONCE)
        ])  # fmt: skip

    def four_masks(self) -> None:
        """Paint the prompt on the mask and on those of the three rows that follow, all from the same noise."""
        self._start(lambda mask, prompt, settings: [
            (each, prompt, settings) for each in (mask, *self.picker.following(AT_ONCE - 1))
        ])  # fmt: skip

    def _start(self, orders: Callable[[np.ndarray, str, SampleConfig], list[Order]]) -> None:
        """Paint in a thread; the kernel stays free, so Stop is heard."""
        if self.worker is not None and self.worker.is_alive():
            return
        self.stopped.clear()
        self._busy(True)
        self.worker = threading.Thread(target=self._work, args=(orders,), daemon=True)
        self.worker.start()

    def _work(self, orders: Callable[[np.ndarray, str, SampleConfig], list[Order]]) -> None:
        try:
            time.sleep(SETTLING)
            self.controls.renew_seed()
            wanted = orders(self.canvas.mask, self.controls.prompt.value, self.controls.settings())
            self._paint(wanted)
        except Exception as error:  # whatever it is, the panel goes on
            self.fail(error)
        finally:
            self._busy(False)

    def _paint(self, wanted: list[Order]) -> None:
        done, steps, began = 0, wanted[0][2].num_inference_steps, time.monotonic()
        self.progress.value, self.progress.max, step = 0, steps * len(wanted), 0
        self.gallery.begin(len(wanted))
        self.tell("Painting ...")

        def on_step(number: int) -> bool:
            nonlocal step
            step = number
            self.progress.value = done * steps + step
            self.tell(f"Painting {done + 1} of {len(wanted)}: step {step} of {steps}")
            return self.stopped.is_set()

        for picture in generate_each(self.painter, wanted, on_step):
            self.gallery.add(picture)
            done += 1
        if self.stopped.is_set():
            self.tell(f"Stopped in step {step} of {steps}; {done} of {len(wanted)} painted.")
        else:
            self.tell(f"Painted {done} of {len(wanted)} in {time.monotonic() - began:.1f} s.")

    def _busy(self, busy: bool) -> None:
        for button in (self.generate_button, self.captions_button, self.masks_button):
            button.disabled = busy
        self.stop_button.disabled = not busy

    def save(self, picture: GeneratedImage) -> int:
        """Append an image, with mask, caption and settings, to the data set in `save_dir`; returns its row."""
        row = picture.save(self.save_dir, self.split.palette)
        self.tell(f"Saved as row {row} of {self.save_dir}.")
        return row


def panel(painter: Pipeline, split: Split, save_dir: str | Path, defaults: SampleConfig = DEFAULTS) -> Panel:
    """The panel over a split's masks, its controls as in `defaults`; what is saved goes to the data set `save_dir`."""
    return Panel(painter, split, save_dir, defaults)
