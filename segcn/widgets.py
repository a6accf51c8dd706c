"""The panel of notebook 04: paint a mask, write a prompt, see pictures, keep some. Under voila it is an app."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import numpy as np

from segcn.arguments import make
from segcn.by_hand import Order, Picture, paint_each
from segcn.captions import variations
from segcn.config import SampleConfig
from segcn.gallery import Gallery
from segcn.mask_painter import MaskPainter
from segcn.mask_picker import MaskPicker
from segcn.panel_settings import PanelSettings
from segcn.pipeline import Painter
from segcn.records import Split

DEFAULTS = make(SampleConfig, "tiny")
SETTLING = 0.2  # s before a press reads the controls: JupyterLab's press can overtake a change made just before it
AT_ONCE = 4  # captions, or masks, beside each other


class Panel(w.VBox):
    """Mask painter on the left, settings and buttons on the right, pictures below; it paints in a thread of its own."""

    def __init__(self, painter: Painter, split: Split, save_dir: str | Path, defaults: SampleConfig):
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

    def reuse(self, picture: Picture) -> None:
        """Bring back what a picture was painted from; Generate paints it again."""
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
        """Paint the mask and the prompt as they stand, picture k with the k-th seed from the one that is shown on."""

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

        for picture in paint_each(self.painter, wanted, on_step):
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

    def save(self, picture: Picture) -> int:
        """Append a picture, with mask, caption and settings, to the data set in `save_dir`; returns its row."""
        row = picture.save(self.save_dir, self.split.palette)
        self.tell(f"Saved as row {row} of {self.save_dir}.")
        return row


def panel(painter: Painter, split: Split, save_dir: str | Path, defaults: SampleConfig = DEFAULTS) -> Panel:
    """The panel over a split's masks, its controls as in `defaults`; what is saved goes to the data set `save_dir`."""
    return Panel(painter, split, save_dir, defaults)
