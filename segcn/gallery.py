"""The painted pictures: a grid of those of one press, and the way back to those of earlier ones."""

import io
from collections.abc import Callable

import ipywidgets as w
import numpy as np
from PIL import Image

from segcn import show
from segcn.by_hand import Picture
from segcn.errors import UserError
from segcn.labels import Palette
from segcn.masks import colourise

HISTORY = 100  # presses that can be gone back to
VIEWS = ("picture", "outlines", "classes", "mask")
ALONE, BESIDE = 360, 214  # px of a picture's width


class Card(w.VBox):
    """One picture with its caption and seed; Save and Use again call back with it."""

    def __init__(self, picture: Picture, side: int, save: Callable[["Card"], None], reuse: Callable[[Picture], None]):
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
        """Show the picture, the borders of the classes over it, their colours over it, or the mask."""
        if view == self.seen:
            return
        image, mask, self.seen = self.picture.image, self.picture.mask, view
        if view == "outlines":
            image = show.outlined(image, mask)
        elif view == "classes":
            image = show.overlay(image, mask, palette)
        elif view == "mask":
            image = colourise(mask, palette)
        self.image.value = png(image)


class Gallery(w.VBox):
    """The cards of one press; `save(picture)` returns the row it became, `reuse(picture)` brings its order back."""

    def __init__(
        self,
        palette: Palette,
        save: Callable[[Picture], int],
        reuse: Callable[[Picture], None],
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
        """The next `count` pictures are those of a new press."""
        self.fresh, self.side = True, ALONE if count == 1 else BESIDE

    def add(self, picture: Picture) -> None:
        """Show a picture as soon as it is painted; to someone who looks at an earlier press it waits in the history."""
        card = Card(picture, self.side, self.keep, self.reuse)
        watched = self.fresh or self.shown == len(self.entries) - 1
        if self.fresh:
            self.entries = [*self.entries[1 - HISTORY :], []]
            self.fresh = False
        self.entries[-1].append(card)
        self.turn_to(len(self.entries) - 1 if watched else self.shown)

    def turn_to(self, number: int) -> None:
        """Show the pictures of a press, counted from 0; one that is not there changes nothing."""
        self.shown = number if 0 <= number < len(self.entries) else self.shown
        self._look()
        self.grid.children = self.cards
        self.back.disabled, self.forward.disabled = self.shown <= 0, self.shown >= len(self.entries) - 1
        self.save_all.disabled = not self.cards
        self.place.value = f"{self.shown + 1} of {len(self.entries)}" if self.entries else "nothing painted yet"

    def keep(self, card: Card) -> None:
        """Save a card's picture, once: a second press may be on its way."""
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
    """A picture, uint8 [H, W, 3], as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()
