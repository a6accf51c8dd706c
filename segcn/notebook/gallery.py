"""The images of the panel: a card each, how far it follows its mask, and the way back to earlier ones."""

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import numpy as np
from PIL import Image

from segcn.data.masks import colorize
from segcn.data.palette import IGNORE, Palette
from segcn.notebook.canvas import button
from segcn.utils.errors import UserError

if TYPE_CHECKING:  # at run time with torch, which takes seconds to be imported
    from segcn.generate.infer import GeneratedImage
    from segcn.models.segmenter import AnySegmenter

HISTORY = 100  # presses that can be gone back to
VIEWS = ("image", "outlines", "classes", "mask", "disagreement")
WRONG = np.array((255, 0, 255), np.uint8)  # color of pixels in which the segmenter disagrees


def png_file(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def look_for(mask: np.ndarray, image: np.ndarray, segmenter: "AnySegmenter") -> tuple[float, np.ndarray]:
    """mIoU of what a segmenter finds in an image, uint8 [H, W, 3], and where it is not the mask, bool [H, W].

    mask: class ids, uint8 [H, W]; where it is unlabelled nothing is compared, and without a label mIoU is nan.
    """
    import torch

    from segcn.evaluate.metrics import confusion_matrix, iou

    predicted, wanted = segmented(image, segmenter), torch.from_numpy(mask)
    found = iou(confusion_matrix(torch.from_numpy(predicted), wanted, segmenter.num_classes)).nanmean()
    return float(found), (predicted != mask) & (mask != IGNORE)


def segmented(image: np.ndarray, segmenter: "AnySegmenter") -> np.ndarray:
    """The class ids, uint8 [H, W], that a segmenter finds in an image, uint8 [H, W, 3]."""
    import torch

    from segcn.data.dataset import to_image
    from segcn.models.segmenter import predict

    return predict(segmenter, to_image(torch.from_numpy(image).movedim(-1, 0)[None]))[0].numpy()


class Card(w.VBox):
    """One image with its caption, seed and mIoU; `actions`: what its buttons do with it, by their text."""

    def __init__(self, made: "GeneratedImage", found: tuple[float, np.ndarray] | None, actions: dict[str, Callable]):
        self.generated, self.found, self.seen = made, found, ""
        self.image = w.Image()  # it can have no tooltip
        self.image.add_class("segcn-image")
        self.save_button, self.reuse_button, self.download_button = (
            button(text, partial(act, self)) for text, act in actions.items()
        )
        self.agreement = w.Label(f"follows its mask: mIoU {found[0]:.2f}" if found else "")
        self.agreement.tooltip = (
            "mean intersection over union of the classes in the mask and those that the segmenter finds in the image;"
            " 1: all pixels agree"
        )
        seed, stopped = made.settings.seed, made.record.get("stopped")
        where = f", stopped in step {stopped} of {made.settings.num_inference_steps}" if stopped else ""
        caption, seed = w.Label(made.caption), w.Label(f"seed {seed}{where}")
        caption.add_class("segcn-wrapped")
        seed.add_class("segcn-quiet")
        press, known = (
            w.HBox([self.save_button, self.reuse_button, self.download_button]),
            w.HBox([self.agreement, seed]),
        )
        for line in (press, known):
            line.layout.flex_flow = "row wrap"
        known.add_class("segcn-known")
        super().__init__([press, self.image, known, caption])
        self.add_class("segcn-card")

    def look(self, view: str, palette: Palette) -> None:
        """Show the image, the borders of the classes over it, their colors over it, the mask, or what disagrees."""
        from segcn.data import visualize

        if view == self.seen:
            return
        image, mask, self.seen = self.generated.image, self.generated.mask, view
        shown: dict[str, Callable[[], Any]] = {
            "image": lambda: image, "outlines": lambda: visualize.outlined(image, mask),
            "classes": lambda: visualize.overlay(image, mask, palette), "mask": lambda: colorize(mask, palette),
            "disagreement": lambda: np.where(self.found[1][..., None], WRONG, image // 2 + 64) if self.found else image,
        }  # fmt: skip
        self.image.value = png_file(shown[view]())


class Gallery(w.VBox):
    """The cards of one press, the preview of the image at work, and the way back to earlier ones.

    `save(image)` returns the row it became, `reuse(image)` brings its order back, `say(text)` shows a message, and
    `download(name, content)` hands out a file.
    """

    def __init__(self, palette: Palette, save: Callable, reuse: Callable, say: Callable, download: Callable):
        self.palette, self.save, self.say = palette, save, say
        self.segmenter: AnySegmenter | None = None
        self.actions = {"Save": self.keep, "Use again": lambda card: reuse(card.generated),
                        "Download": lambda card: download("image.png", card.generated.png())}  # fmt: skip
        self.entries: list[list[Card]] = []
        self.shown, self.fresh, self.alone = -1, True, True
        self.view, self.place = w.Dropdown(options=VIEWS, layout=w.Layout(width="124px"), tooltip="view"), w.Label()
        self.view.observe(lambda _: self.turn_to(self.shown), "value")
        self.back = button("Back", lambda: self.turn_to(self.shown - 1))
        self.forward = button("Forward", lambda: self.turn_to(self.shown + 1))
        self.save_all = button("Save all", self.keep_all)
        self.preview = w.Image()
        self.preview.add_class("segcn-image")
        self.preview.add_class("segcn-preview")
        self.grid = w.Box(layout=w.Layout(flex_flow="row wrap", grid_gap="10px"))
        self.grid.add_class("segcn-grid")
        bar = w.HBox([self.view, self.back, self.forward, self.place, self.save_all])
        bar.layout.align_items = "center"
        super().__init__([bar, self.grid])
        self.turn_to(-1)

    @property
    def cards(self) -> list[Card]:
        """Those that are shown."""
        return self.entries[self.shown] if self.entries else []

    def begin(self, count: int) -> None:
        """The next `count` images are those of a new press."""
        self.fresh, self.alone = True, count == 1

    def foresee(self, image: np.ndarray) -> None:
        """Show what the image at work is going to be, uint8 [H, W, 3], until it is there."""
        self.preview.value = png_file(image)
        cards = [] if self.fresh else self.entries[-1]
        if self.fresh or self.shown == len(self.entries) - 1:
            self.grid.children = [*cards, self.preview]

    def end(self) -> None:
        """No image is at work any more."""
        self.turn_to(self.shown)

    def add(self, made: "GeneratedImage") -> None:
        """Show an image as soon as it is there; to someone who looks at an earlier press it waits in the history."""
        latest = self.fresh or self.shown == len(self.entries) - 1
        if self.fresh:
            self.entries = [*self.entries[1 - HISTORY :], []]
            self.fresh = False
        labelled = self.segmenter is not None and (made.mask != IGNORE).any()
        found = look_for(made.mask, made.image, self.segmenter) if labelled and self.segmenter is not None else None
        card = Card(made, found, self.actions)
        if self.alone:
            card.add_class("segcn-alone")
        self.entries[-1].append(card)
        self.turn_to(len(self.entries) - 1 if latest else self.shown)

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
            row = self.save(card.generated)
        except (UserError, OSError) as error:
            return self.say(f"Error: {error}")
        card.save_button.description, card.save_button.disabled = f"Row {row}", True
