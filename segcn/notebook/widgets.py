"""The panel of notebook 04 and of `segcn app`: draw a mask, write a prompt, see images, keep some."""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w
import numpy as np

from segcn.data.captions import CLASSES, classes_named, classes_of, listed, variations
from segcn.data.masks import count_ids
from segcn.data.metadata import Split
from segcn.data.palette import IGNORE, Label
from segcn.generate.config import SampleConfig
from segcn.notebook.canvas import MaskCanvas, MaskPicker, button
from segcn.notebook.gallery import Gallery, segmented
from segcn.utils.args import make
from segcn.utils.errors import UserError

if TYPE_CHECKING:  # at run time with torch and diffusers, which take seconds to be imported
    from segcn.generate.infer import GeneratedImage, Order
    from segcn.generate.pipeline import Pipeline
    from segcn.models.segmenter import AnySegmenter

WIDE, HALF = w.Layout(width="400px"), w.Layout(width="196px")
SEEDS = 2**31  # new seeds are drawn below it
AT_ONCE = 4  # captions, or masks, beside each other
SETTLING = 0.2  # s before a press reads the controls: JupyterLab's press can overtake a change made just before it
PREVIEWS = 0.4  # s at least from one preview to the next
NAMED_ROWS = 200  # captions in which names of classes are looked for
DEFAULTS = make(SampleConfig, "tiny")
SHOWN = {  # control -> setting, or start and end
    "steps": "num_inference_steps", "guidance": "guidance_scale", "strength": "controlnet_conditioning_scale",
    "negative_prompt": "negative_prompt", "scheduler": "scheduler", "seed": "seed",
}  # fmt: skip
WINDOWS = {"guidance_window": ("guidance_start", "guidance_end"),
           "window": ("control_guidance_start", "control_guidance_end")}  # fmt: skip
FROM_TEXT = "The mask is all unlabelled: generating from the text alone."


class PanelSettings(w.VBox):
    """Prompt, settings, number of images and seed; what it does not show stays as in `defaults`.

    `prompt` is to be shown by the panel.
    """

    def __init__(self, defaults: SampleConfig):
        self.defaults = defaults
        plain = {"layout": WIDE, "style": {"description_width": "104px"}}
        line = plain | {"continuous_update": False}  # sent when left, so before the button that is pressed next
        half = line | {"layout": HALF}  # fields: a slider forgets a number typed without Enter
        share = line | {"min": 0, "max": 1, "step": 0.05, "readout_format": ".0%"}
        hint = f"what the image should show; {CLASSES} becomes the classes in the mask"
        self.prompt = w.Textarea(description="prompt", placeholder=hint, layout=w.Layout(flex="1", height="auto"))
        self.prompt.style.description_width = "auto"
        self.negative_prompt = w.Text(description="not wanted", placeholder="negative prompt", **line)
        self.steps = w.BoundedIntText(min=1, max=1000, description="steps", **half)
        self.number = w.BoundedIntText(1, min=1, max=16, description="images", **half)
        self.guidance = w.BoundedFloatText(min=1, max=100, step=0.5, description="guidance", **half)
        self.strength = w.BoundedFloatText(min=0, max=100, step=0.1, description="mask weight", **half)
        self.guidance_window = w.FloatRangeSlider(description="text acts", **share)
        self.window = w.FloatRangeSlider(description="mask acts", **share)
        samplers = SampleConfig.__dataclass_fields__["scheduler"].metadata["choices"]
        self.scheduler = w.Dropdown(options=samplers, description="scheduler", **plain)
        seed = plain | {"layout": w.Layout(width="246px")}
        self.seed = w.BoundedIntText(max=2 * SEEDS, description="seed", **seed)
        self.lock = w.ToggleButton(layout=w.Layout(width="150px"), tooltip="a new seed a press, or this one")
        self.lock.observe(lambda _: self._name_lock(), "value")
        self._name_lock()
        self.show(defaults)
        pairs = (self.steps, self.number), (self.guidance, self.strength)
        windows = [self.guidance_window, self.window]
        last = w.HBox([self.seed, self.lock])
        super().__init__([self.negative_prompt, *map(w.HBox, pairs), *windows, self.scheduler, last])

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


class Panel(w.VBox):
    """Canvas and settings over a split's masks, images beside; what is saved goes to the data set `save_dir`.

    pipeline: None where `load` brings it. segmenter: says how far images follow their masks; None: nobody does.
    """

    def __init__(
        self, pipeline: "Pipeline | None", split: Split, save_dir: str | Path, defaults: SampleConfig = DEFAULTS,
        segmenter: "AnySegmenter | None" = None,
    ):  # fmt: skip
        self.pipeline, self.split, self.save_dir = pipeline, split, Path(save_dir)
        self.worker: threading.Thread | None = None
        self.loader: threading.Thread | None = None
        self.stopped = threading.Event()
        self.suggested = ""  # the prompt that the panel wrote: what a person writes stays
        self.controls = PanelSettings(defaults)
        self.canvas = MaskCanvas(split.palette, self.check, self.generate)
        self.status, self.progress = w.Label(), w.IntProgress(layout=w.Layout(width="170px", height="10px"))
        self.status.add_class("segcn-wrapped")
        self.status.add_class("segcn-status")
        self.gallery = Gallery(split.palette, self.save, self.reuse, self.say, self.canvas.download)
        self.gallery.segmenter = segmenter
        self.picker = MaskPicker(split, defaults, self.canvas, self.use, lambda error: self.say(f"Error: {error}"))
        self.generate_button = button("Generate", self.generate, "110px", button_style="primary")
        self.generate_button.tooltip = "Ctrl+Enter"
        self.stop_button = button("Stop", self.stopped.set, "64px", disabled=True)
        self.add_button = button("", self.add_classes, button_style="info")
        self.add_button.tooltip = "the mask holds these classes, and the prompt does not name them"
        self.mask_button = button("Photo to mask", self.photo_to_mask)
        self.mask_button.tooltip = "the classes that the segmenter finds in the photo"
        self.captions_button = button("Same mask, four captions", self.four_captions, "196px")
        self.masks_button = button("Same caption, four masks", self.four_masks, "196px")
        self.settings_button = w.ToggleButton(description="Settings", layout=w.Layout(width="auto"))
        self.settings_button.tooltip = "steps, guidance, seed, images at once, size of a new mask, a mask's path"
        self.settings_button.add_class("segcn-more")
        self.settings_button.observe(lambda change: self._unfold(change.new), "value")
        self.controls.prompt.observe(lambda _: self.check(), "value")
        self.named = self._named_classes()
        super().__init__(self._parts())
        self.add_class("segcn-panel")
        self.picker.pick()
        self.say("Draw on the mask, write a prompt, press Generate.")

    def _parts(self) -> list[w.Widget]:
        """The prompt and its buttons, messages, mask and images beside each other, settings."""
        work = w.VBox([w.HBox([self.generate_button, self.stop_button]), self.progress])
        said = w.HBox([self.status, self.add_button], layout=w.Layout(flex="1 1 380px", align_items="center"))
        said.layout.flex_flow = "row wrap"
        more = w.HBox([self.captions_button, self.masks_button, self.settings_button])
        top, notes = w.HBox([self.controls.prompt, work]), w.HBox([said, more])
        top.add_class("segcn-top")
        notes.add_class("segcn-notes")
        notes.layout.flex_flow, more.layout.flex_flow = "row wrap", "row wrap"
        self.picker.children = (*self.picker.children, self.mask_button)
        for control, name in ((self.picker.path, "mask file"), (self.picker.size, "new mask, px")):
            control.description, control.layout, control.style.description_width = name, WIDE, "104px"
        self.picker.again.layout.align_self = "flex-end"
        settings = w.VBox([self.controls, self.picker.size, self.picker.path, self.picker.again])
        settings.add_class("segcn-settings")
        left = w.VBox([self.picker, self.canvas])
        across = w.Box([left, self.gallery, settings])
        across.layout = w.Layout(flex_flow="row wrap", grid_gap="4px 14px", align_items="flex-start")
        across.add_class("segcn-across")
        return [top, notes, across]

    def _unfold(self, open: bool) -> None:
        """Show the settings, or hide them, where the panel is the whole page; in a notebook they are always shown."""
        (self.add_class if open else self.remove_class)("segcn-open")

    def load(self, models: "Callable[[], tuple[Pipeline, AnySegmenter | None]]") -> None:
        """Bring pipeline and segmenter in a thread: what is done meanwhile waits for them only where it needs them."""

        def bring() -> None:
            try:
                self.pipeline, self.gallery.segmenter = models()
                if not self.busy:
                    self.say("Ready. Draw on the mask, write a prompt, press Generate.")
            except Exception as error:  # shown where it is looked for
                self.say(f"Error: {error}")

        self.say("Loading the model; you can draw meanwhile.")
        self.loader = threading.Thread(target=bring, daemon=True)
        self.loader.start()

    @property
    def busy(self) -> bool:
        """Whether something is being generated."""
        return self.worker is not None and self.worker.is_alive()

    def use(self, mask: np.ndarray, caption: str | None = None) -> None:
        """Put a mask, uint8 [H, W], on the canvas, and a caption into the prompt unless a person wrote one."""
        prompt = self.controls.prompt
        if caption is not None and prompt.value in ("", self.suggested):
            prompt.value = self.suggested = caption
        if self.canvas.under is not None and self.canvas.under.shape[:2] != mask.shape:
            self.canvas.lay_under(None)
        self.canvas.load(mask)
        self.say(f"A mask of {mask.shape[1]} x {mask.shape[0]} pixels.")

    def reuse(self, made: "GeneratedImage") -> None:
        """Bring back what an image was made from; Generate makes it again."""
        self.use(made.mask)
        self.controls.prompt.value = made.caption
        self.controls.show(made.settings)
        self.controls.lock.value = True

    def say(self, text: str) -> None:
        """Show a message in the panel; never read as HTML."""
        self.status.value = text

    # What the mask holds and the prompt says

    def _named_classes(self) -> dict[int, str]:
        """The classes that captions of the split name, each by the word they use; all by their names if none is."""
        text = "\n".join(record.caption for record in self.split.records[:NAMED_ROWS])
        labels = [label for label in self.split.palette.labels if not label.ignore]
        named = classes_named(text, self.split.palette)

        def used(label: Label) -> str:
            return next((word for word in (label.name, *label.words) if word.lower() in text.lower()), label.name)

        return {label.id: used(label) for label in labels if label.id in named or not named}

    def missing(self) -> list[str]:
        """The classes in the mask, the largest first, that captions usually name and this prompt does not."""
        if not self.canvas.ids:
            return []
        pixels, prompt = count_ids(self.canvas.mask), self.controls.prompt.value
        found = set() if CLASSES not in prompt else set(self.named)
        found |= classes_named(prompt, self.split.palette)
        return [self.named[id] for id in np.argsort(-pixels, kind="stable").tolist()
                if pixels[id] and id in self.named and id not in found]  # fmt: skip

    def check(self) -> None:
        """Offer what can be done: to add classes of the mask to the prompt, and to make a mask of the photo."""
        missing = listed(self.missing())
        self.add_button.layout.display = "" if missing else "none"
        self.add_button.description = f"Add to the prompt: {missing}" if missing else ""
        self.mask_button.layout.display = "none" if self.canvas.under is None else ""

    def add_classes(self) -> None:
        """Add these classes to the prompt."""
        prompt, missing = self.controls.prompt.value.strip(), listed(self.missing())
        if missing:
            self.controls.prompt.value = f"{prompt}, {missing}" if prompt else missing

    # Generating

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

    def photo_to_mask(self) -> None:
        """Put the classes that the segmenter finds in the photo on the canvas."""
        self._begin(self._segment)

    def _start(self, orders: "Callable[[np.ndarray, str, SampleConfig], list[Order]]") -> None:
        """Generate what is ordered for the mask, prompt and settings that are shown."""

        def work() -> None:
            self.controls.renew_seed()
            ordered = orders(self.canvas.mask, self.controls.prompt.value, self.controls.settings())
            self._generate([
                (mask, text.replace(CLASSES, classes_of(mask, self.split.palette)), settings)
                for mask, text, settings in ordered
            ])  # fmt: skip

        self._begin(work)

    def _begin(self, work: Callable[[], None]) -> None:
        """Work in a thread: the kernel stays free and can react to Stop."""
        if not self.busy:
            self.stopped.clear()
            self._show_busy(True)
            self.worker = threading.Thread(target=self._work, args=(work,), daemon=True)
            self.worker.start()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            time.sleep(SETTLING)
            if self.loader is not None and self.loader.is_alive():
                self.say("Loading the model ...")
                self.loader.join()
            if self.pipeline is not None:  # else what failed is shown
                work()
        except Exception as error:  # whatever it is, the panel stays usable
            self.gallery.end()
            self.say(f"Error: {error}")
        finally:
            self._show_busy(False)

    def _segment(self) -> None:
        if self.canvas.under is None:
            raise UserError("there is no photo yet: choose one by Photo")
        if self.gallery.segmenter is None:
            raise UserError("there is no segmenter of these classes: name one by --segmenter")
        self.canvas.load(segmented(self.canvas.under, self.gallery.segmenter))
        self.say("The mask is what the segmenter finds in the photo.")

    def _generate(self, wanted: "Sequence[Order]") -> None:
        from segcn.generate.infer import generate_each

        assert self.pipeline is not None
        done, steps, began = 0, wanted[0][2].num_inference_steps, time.monotonic()
        seen = began - PREVIEWS  # when the last preview was shown
        self.progress.value, self.progress.max = 0, steps * len(wanted)
        self.gallery.begin(len(wanted))
        self.say("Generating ...")

        def on_guess(step: int, guess: Callable[[], np.ndarray]) -> bool:
            nonlocal seen
            self.progress.value = done * steps + step
            now = time.monotonic()
            left = (now - began) / self.progress.value * (self.progress.max - self.progress.value)
            alone = f" {FROM_TEXT}" if (wanted[done][0] == IGNORE).all() else ""
            self.say(f"Generating {done + 1} of {len(wanted)}: step {step} of {steps}, about {left:.0f} s left.{alone}")
            if now - seen > PREVIEWS and step < steps:
                seen = now
                self.gallery.foresee(guess()[0])
            return self.stopped.is_set()

        for made in generate_each(self.pipeline, wanted, on_guess):
            self.gallery.add(made)
            if "stopped" not in made.record:
                done += 1
        self.gallery.end()  # before it is said: a press of Back may follow at once
        if self.stopped.is_set():
            self.say(f"Stopped; {done} of {len(wanted)} generated, and one as far as it was.")
        else:
            alone = " From the text alone: the mask is all unlabelled." if (wanted[0][0] == IGNORE).all() else ""
            self.say(f"Generated {done} of {len(wanted)} in {time.monotonic() - began:.1f} s.{alone}")

    def _show_busy(self, busy: bool) -> None:
        for each in (self.generate_button, self.captions_button, self.masks_button, self.mask_button):
            each.disabled = busy
        self.stop_button.disabled = not busy

    def save(self, made: "GeneratedImage") -> int:
        """Append an image, with mask, caption and settings, to the data set in `save_dir`; returns its row."""
        row = made.save(self.save_dir, self.split.palette)
        self.say(f"Saved as row {row} of {self.save_dir}.")
        return row
