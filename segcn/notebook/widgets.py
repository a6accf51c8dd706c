"""The panel of notebook 04: paint a mask, write a prompt, see images, keep some. Under voila it is an app."""

import dataclasses
import io
import secrets
import threading
import time
from collections.abc import Callable, Sequence
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

HERE = Path(__file__).parent
UNLABELLED = ("unlabelled", "unlabeled")
WIDE, HALF = w.Layout(width="400px"), w.Layout(width="196px")
SEEDS = 2**31  # new seeds are drawn below it
LISTED_ROWS = 500  # masks in the dropdown
HISTORY = 100  # presses that can be gone back to
ALONE, BESIDE = 360, 214  # px of an image's width
AT_ONCE = 4  # captions, or masks, beside each other
SETTLING = 0.2  # s before a press reads the controls: JupyterLab's press can overtake a change made just before it
DEFAULTS = make(SampleConfig, "tiny")
SHOWN = {  # control -> setting, or start and end
    "steps": "num_inference_steps", "guidance": "guidance_scale", "strength": "controlnet_conditioning_scale",
    "negative_prompt": "negative_prompt", "scheduler": "scheduler", "seed": "seed",
}  # fmt: skip
WINDOWS = {"guidance_window": ("guidance_start", "guidance_end"),
           "window": ("control_guidance_start", "control_guidance_end")}  # fmt: skip


class MaskPainter(anywidget.AnyWidget):
    """A canvas in the browser with brush, fill, eraser, undo and the classes of a palette; `mask` is what it shows."""

    _esm = HERE / "painter.js"
    _css = HERE / "painter.css"
    ids = CByteMemoryView().tag(sync=True, echo_update=False)  # traitlets.Bytes refuses what a browser sends
    width = Int().tag(sync=True)
    height = Int().tag(sync=True)
    labels: List[dict] = List().tag(sync=True)
    eraser = Int(IGNORE).tag(sync=True)

    def __init__(self, palette: Palette):
        super().__init__(labels=painter_labels(palette), eraser=erased(palette)[0])
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

    def _receive(self, _, content: dict, buffers: list) -> None:
        """A change made in the browser; nothing is sent back, since more may have been painted by now."""
        expected = ("painted", self.height, self.width)
        if (content.get("kind"), content.get("height"), content.get("width")) != expected:
            return  # painted on a mask that is not shown any more
        if len(buffers) == 1 and len(buffers[0]) == self.height * self.width:
            self.set_state({"ids": memoryview(bytes(buffers[0]))})


def painter_labels(palette: Palette) -> list[dict]:
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


def button(text: str, press: Callable[[], None], width: str = "84px", **more) -> w.Button:
    """A button that calls `press`."""
    made = w.Button(description=text, layout=w.Layout(width=width), **more)
    made.on_click(lambda _: press())
    return made


class PanelSettings(w.VBox):
    """Prompt, settings, number of images and seed; what it does not show stays as in `defaults`."""

    def __init__(self, defaults: SampleConfig):
        self.defaults = defaults
        plain = {"layout": WIDE, "style": {"description_width": "104px"}}
        line = plain | {"continuous_update": False}  # sent when left, so before the button that is pressed next
        half = line | {"layout": HALF}  # fields: a slider forgets a number typed without Enter
        share = line | {"min": 0, "max": 1, "step": 0.05, "readout_format": ".0%"}
        self.prompt = w.Textarea(description="prompt", rows=3, **line)
        self.negative_prompt = w.Text(description="not wanted", placeholder="negative prompt", **line)
        self.steps = w.BoundedIntText(min=1, max=1000, description="steps", **half)
        self.number = w.BoundedIntText(1, min=1, max=16, description="images", **half)
        self.guidance = w.BoundedFloatText(min=1, max=100, step=0.5, description="guidance", **half)
        self.strength = w.BoundedFloatText(min=0, max=100, step=0.1, description="mask weight", **half)
        self.guidance_window = w.FloatRangeSlider(description="text acts", **share)
        self.window = w.FloatRangeSlider(description="mask acts", **share)
        self.scheduler = w.Dropdown(options=list(SCHEDULERS), description="scheduler", **plain)
        seed = plain | {"layout": w.Layout(width="246px")}
        self.seed = w.BoundedIntText(max=2 * SEEDS, description="seed", **seed)
        self.lock = w.ToggleButton(layout=w.Layout(width="150px"), tooltip="a new seed a press, or this one")
        self.lock.observe(lambda _: self._name_lock(), "value")
        self._name_lock()
        self.show(defaults)
        pairs = (self.steps, self.number), (self.guidance, self.strength)
        windows = [self.guidance_window, self.window]
        texts, last = [self.prompt, self.negative_prompt], w.HBox([self.seed, self.lock])
        super().__init__([*texts, *map(w.HBox, pairs), *windows, self.scheduler, last])

    def settings(self) -> SampleConfig:
        """The settings that the controls show; UserError where the mask would act in no step."""
        start, end = self.window.value
        if start == end:
            raise UserError(f"mask acts: expected some of the steps, found {start:.0%} to {end:.0%}; widen it")
        values = {setting: getattr(self, control).value for control, setting in SHOWN.items()}
        for control, names in WINDOWS.items():
            values |= dict(zip(names, getattr(self, control).value, strict=True))
        return dataclasses.replace(self.defaults, **values)

    def show(self, settings: SampleConfig) -> None:
        """Put other settings into the controls."""
        for control, setting in SHOWN.items():
            getattr(self, control).value = getattr(settings, setting)
        for control, (start, end) in WINDOWS.items():
            getattr(self, control).value = getattr(settings, start), getattr(settings, end)

    def renew_seed(self) -> None:
        """A new seed, unless it is locked."""
        if not self.lock.value:
            self.seed.value = secrets.randbelow(SEEDS)

    def _name_lock(self) -> None:
        self.lock.description = "locked" if self.lock.value else "new each time"
        self.lock.icon = "lock" if self.lock.value else "unlock"


class MaskPicker(w.VBox):
    """Calls `use(mask, caption)` with a mask of the data set or of a file (caption None), or `fail(error)`."""

    def __init__(self, split: Split, settings: SampleConfig, use: Callable, fail: Callable[[Exception], None]):
        self.split, self.shape, self.use, self.fail = split, (settings.resolution, settings.fit), use, fail
        captions = [record.caption[:60] for record in split.records[:LISTED_ROWS]]
        options = [(f"{row}: {caption}", row) for row, caption in enumerate(captions)]
        line = {"layout": w.Layout(width="392px"), "style": {"description_width": "60px"}}
        self.row = w.Dropdown(options=options, description="mask", **line)
        hint = "a mask's path: class ids or palette colors"
        self.path = w.Text(description="or file", placeholder=hint, continuous_update=False, **line)
        self.again = button("Reload", self.pick, "112px", tooltip="this row's mask as it is in the data set")
        self.upload = w.FileUpload(description="Upload", layout=w.Layout(width="112px"))
        self.row.observe(lambda _: self.pick(), "value")
        self.path.observe(lambda _: self._read_file(), "value")
        self.upload.observe(lambda _: self._read_upload(), "value")
        super().__init__([w.HBox([self.row, self.again]), w.HBox([self.path, self.upload])])

    def pick(self) -> None:
        """Use the chosen row's mask and caption."""
        record = self.split[self.row.value]
        self._use(record.mask, record.caption)

    def following(self, count: int) -> list[np.ndarray]:
        """The masks of the rows after the chosen one, at the end from the first on, as many as there are."""
        rows = [(self.row.value + 1 + k) % len(self.split) for k in range(min(count, len(self.split) - 1))]
        return [read_control_mask(self.split[row].mask, self.split.palette, *self.shape) for row in rows]

    def _read_file(self) -> None:
        if self.path.value.strip():
            self._use(Path(self.path.value.strip()).expanduser())

    def _read_upload(self) -> None:
        for file in self.upload.value[:1]:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "mask"
                path.write_bytes(file["content"])
                self._use(path, name=file["name"])
            self.upload.value = ()

    def _use(self, path: Path, caption: str | None = None, name: str | None = None) -> None:
        """name: of the user's own file, where `path` is a temporary copy of it."""
        try:
            self.use(read_control_mask(path, self.split.palette, *self.shape), caption)
        except (UserError, OSError) as error:
            self.fail(UserError(str(error).replace(str(path), name)) if name else error)


class Card(w.VBox):
    """One image with its caption and seed; `save(card)` and `reuse(image)` are what its buttons do."""

    def __init__(self, made: GeneratedImage, side: int, save: Callable, reuse: Callable):
        self.picture, self.seen = made, ""
        self.image = w.Image(layout=w.Layout(width=f"{side}px"))
        self.save_button = button("Save", lambda: save(self), "auto")
        self.reuse_button = button("Use again", lambda: reuse(made), "auto")
        caption, seed = w.Label(made.caption), w.Label(f"seed {made.settings.seed}")
        caption.add_class("segcn-wrapped")
        seed.add_class("segcn-quiet")
        for each in (self.save_button, self.reuse_button):
            each.layout.flex = "1"
        buttons = w.HBox([self.save_button, self.reuse_button])
        super().__init__([self.image, caption, seed, buttons], layout=w.Layout(width=f"{side + 14}px"))
        self.add_class("segcn-card")

    def look(self, view: str, palette: Palette) -> None:
        """Show the image, the borders of the classes over it, their colors over it, or the mask."""
        if view == self.seen:
            return
        image, mask, self.seen = self.picture.image, self.picture.mask, view
        shown = {"image": lambda: image, "outlines": lambda: visualize.outlined(image, mask),
                 "classes": lambda: visualize.overlay(image, mask, palette),
                 "mask": lambda: colorize(mask, palette)}[view]()  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(shown).save(file, format="PNG")
        self.image.value = file.getvalue()


class Gallery(w.VBox):
    """The cards of one press, and the way back to earlier ones.

    `save(image)` returns the row it became, `reuse(image)` brings its order back, `say(text)` shows a message.
    """

    def __init__(self, palette: Palette, save: Callable, reuse: Callable, say: Callable[[str], None]):
        self.palette, self.save, self.reuse, self.say = palette, save, reuse, say
        self.entries: list[list[Card]] = []
        self.shown, self.fresh, self.side = -1, True, ALONE
        views = ("image", "outlines", "classes", "mask")
        self.view, self.place = w.ToggleButtons(options=views, style={"button_width": "84px"}), w.Label()
        self.view.observe(lambda _: self.turn_to(self.shown), "value")
        self.back = button("Back", lambda: self.turn_to(self.shown - 1))
        self.forward = button("Forward", lambda: self.turn_to(self.shown + 1))
        self.save_all = button("Save all", self.keep_all)
        self.grid = w.Box(layout=w.Layout(flex_flow="row wrap", grid_gap="10px"))
        self.grid.add_class("segcn-grid")
        line = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 8px")
        bar = w.HBox([self.view, self.back, self.forward, self.place, self.save_all], layout=line)
        super().__init__([bar, self.grid])
        self.turn_to(-1)

    @property
    def cards(self) -> list[Card]:
        """Those that are shown."""
        return self.entries[self.shown] if self.entries else []

    def begin(self, count: int) -> None:
        """The next `count` images are those of a new press."""
        self.fresh, self.side = True, ALONE if count == 1 else BESIDE

    def add(self, made: GeneratedImage) -> None:
        """Show an image as soon as it is there; to someone who looks at an earlier press it waits in the history."""
        watched = self.fresh or self.shown == len(self.entries) - 1
        if self.fresh:
            self.entries = [*self.entries[1 - HISTORY :], []]
            self.fresh = False
        self.entries[-1].append(Card(made, self.side, self.keep, self.reuse))
        self.turn_to(len(self.entries) - 1 if watched else self.shown)

    def turn_to(self, number: int) -> None:
        """Show the images of a press, counted from 0, in the chosen view; one that is not there changes nothing."""
        self.shown = number if 0 <= number < len(self.entries) else self.shown
        for card in self.cards:
            card.look(self.view.value, self.palette)
        self.grid.children = self.cards
        self.back.disabled, self.forward.disabled = self.shown <= 0, self.shown >= len(self.entries) - 1
        self.save_all.disabled = not self.cards
        self.place.value = f"{self.shown + 1} of {len(self.entries)}" if self.entries else "no images yet"

    def keep_all(self) -> None:
        """Save the images that are shown."""
        for card in self.cards:
            self.keep(card)

    def keep(self, card: Card) -> None:
        """Save a card's image, once: a second press may be on its way."""
        if card.save_button.disabled:
            return
        try:
            row = self.save(card.picture)
        except (UserError, OSError) as error:
            return self.say(f"Error: {error}")
        card.save_button.description, card.save_button.disabled = f"Row {row}", True


class Panel(w.VBox):
    """Mask painter and settings over a split's masks, images below; what is saved goes to the data set `save_dir`."""

    def __init__(self, pipeline: Pipeline, split: Split, save_dir: str | Path, defaults: SampleConfig = DEFAULTS):
        self.pipeline, self.split, self.save_dir = pipeline, split, Path(save_dir)
        self.worker: threading.Thread | None = None
        self.stopped = threading.Event()
        self.canvas, self.controls = MaskPainter(split.palette), PanelSettings(defaults)
        self.status, self.progress = w.Label(layout=WIDE), w.IntProgress(layout=w.Layout(width="400px", height="12px"))
        self.status.add_class("segcn-wrapped")
        self.status.add_class("segcn-status")
        self.gallery = Gallery(split.palette, self.save, self.reuse, self.say)
        self.picker = MaskPicker(split, defaults, self.use, lambda error: self.say(f"Error: {error}"))
        self.picker.pick()
        self.generate_button = button("Generate", self.generate, "196px", button_style="primary")
        self.stop_button = button("Stop", self.stopped.set, "196px", disabled=True)
        self.captions_button = button("Same mask, four captions", self.four_captions, "196px")
        self.masks_button = button("Same caption, four masks", self.four_masks, "196px")
        pairs = (self.generate_button, self.stop_button), (self.captions_button, self.masks_button)
        right = w.VBox([self.controls, *map(w.HBox, pairs), self.progress, self.status])
        across = w.Layout(flex_flow="row wrap", grid_gap="8px 28px", align_items="flex-start")
        super().__init__([w.Box([w.VBox([self.picker, self.canvas]), right], layout=across), self.gallery])
        self.add_class("segcn-panel")
        self.say("Paint on the mask, write a prompt, press Generate.")

    def use(self, mask: np.ndarray, caption: str | None = None) -> None:
        """Put a mask, uint8 [H, W], on the canvas, and a caption into the prompt."""
        self.canvas.load(mask)
        if caption is not None:
            self.controls.prompt.value = caption
        self.say(f"A mask of {mask.shape[1]} x {mask.shape[0]} pixels.")

    def reuse(self, made: GeneratedImage) -> None:
        """Bring back what an image was made from; Generate makes it again."""
        self.use(made.mask, made.caption)
        self.controls.show(made.settings)
        self.controls.lock.value = True

    def say(self, text: str) -> None:
        """Show a message in the panel; never read as HTML."""
        self.status.value = text

    def generate(self) -> None:
        """Use mask and prompt as shown, image k with the k-th seed from the one that is shown on."""
        self._start(lambda mask, prompt, settings: [
            (mask, prompt, dataclasses.replace(settings, seed=settings.seed + k))
            for k in range(self.controls.number.value)
        ])  # fmt: skip

    def four_captions(self) -> None:
        """Use the mask with the prompt and three others, all with the same noise."""
        others = [record.caption for record in self.split.records]
        self._start(lambda mask, prompt, settings: [
            (mask, text, settings) for text in variations(prompt, others, AT_ONCE)
        ])  # fmt: skip

    def four_masks(self) -> None:
        """Use the prompt with the mask and those of the three rows that follow, all with the same noise."""
        self._start(lambda mask, prompt, settings: [
            (each, prompt, settings) for each in (mask, *self.picker.following(AT_ONCE - 1))
        ])  # fmt: skip

    def _start(self, orders: Callable[[np.ndarray, str, SampleConfig], list[Order]]) -> None:
        """Generate in a thread: the kernel stays free and can react to Stop."""
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
            self._generate(orders(self.canvas.mask, self.controls.prompt.value, self.controls.settings()))
        except Exception as error:  # whatever it is, the panel stays usable
            self.say(f"Error: {error}")
        finally:
            self._busy(False)

    def _generate(self, wanted: Sequence[Order]) -> None:
        done, step, steps, began = 0, 0, wanted[0][2].num_inference_steps, time.monotonic()
        self.progress.value, self.progress.max = 0, steps * len(wanted)
        self.gallery.begin(len(wanted))
        self.say("Generating ...")

        def on_step(number: int) -> bool:
            nonlocal step
            step = number
            self.progress.value = done * steps + step
            self.say(f"Generating {done + 1} of {len(wanted)}: step {step} of {steps}")
            return self.stopped.is_set()

        for made in generate_each(self.pipeline, wanted, on_step):
            self.gallery.add(made)
            done += 1
        if self.stopped.is_set():
            self.say(f"Stopped in step {step} of {steps}; {done} of {len(wanted)} generated.")
        else:
            self.say(f"Generated {done} of {len(wanted)} in {time.monotonic() - began:.1f} s.")

    def _busy(self, busy: bool) -> None:
        for each in (self.generate_button, self.captions_button, self.masks_button):
            each.disabled = busy
        self.stop_button.disabled = not busy

    def save(self, made: GeneratedImage) -> int:
        """Append an image, with mask, caption and settings, to the data set in `save_dir`; returns its row."""
        row = made.save(self.save_dir, self.split.palette)
        self.say(f"Saved as row {row} of {self.save_dir}.")
        return row
