"""Promise: what a person sees and does. Notebook 04 in JupyterLab and under voila, driven in Debian's Chromium."""

import re

import numpy as np
import pytest
from PIL import Image
from servers import (
    OPENED,
    PATIENCE,
    RUN_ALL,
    Server,
    expect,
)

from segcn.data.masks import read_mask
from segcn.data.metadata import read_split
from segcn.generate.infer import read_settings
from segcn.utils.paths import BASE

PROMPT = 'a winter landscape at dusk <img src=x onerror="window.heard = 1"> & a house'
HOUSE = 8
BROKEN = "<img src=x onerror=window.heard=1>.png"


@pytest.fixture(scope="module")
def places(tmp_path_factory, landscapes):
    """Two servers on loopback, each with its own copy of the notebook; both kernels are started at once."""
    servers = {}
    try:
        for name in ("lab", "voila"):
            folder = tmp_path_factory.mktemp(name)
            parameters = {"dataset_name": str(landscapes), "output_dir": str(folder / "out"), "limit": 1,
                          "num_inference_steps": 2, "pretrained_model_name_or_path": str(BASE)}  # fmt: skip
            servers[name] = Server(name, folder, {"04_generate": parameters})
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="module")
def pages(places, browser, browser_context_args):
    """Both pages, opened together: the notebooks run side by side."""
    opened = {}
    for name, server in places.items():
        server.wait()
        opened[name] = browser.new_context(**browser_context_args).new_page()
        opened[name].set_default_timeout(PATIENCE)
        url = server.lab_url("04_generate") if name == "lab" else server.url
        opened[name].goto(url, wait_until="commit")
    lab = opened["lab"]
    lab.wait_for_function(OPENED)
    lab.evaluate(RUN_ALL)
    yield opened
    for page in opened.values():
        page.context.close()


class Person:
    """Someone in front of the panel."""

    def __init__(self, page, shots):
        self.page, self.shots, self.panel = page, shots, page.locator(".segcn-panel")
        self.canvas, self.status = page.locator("canvas.segcn-canvas"), page.locator(".segcn-status")
        self.page.locator("canvas.segcn-canvas[data-ready]").wait_for()
        self.page.set_default_timeout(PATIENCE)

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def paint(self, *points):
        """Draw a line through points given as shares of the canvas's width and height."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=8)
        self.page.mouse.up()

    def write(self, prompt):
        self.panel.locator("textarea").fill(prompt)

    def set(self, name, value):
        """Type a number, and leave the field only for the next button."""
        field = self.panel.locator(".widget-inline-hbox", has=self.page.get_by_text(name, exact=True))
        field.locator("input").fill(str(value))

    def sees(self, text, within=PATIENCE):
        expect(self.status).to_contain_text(re.compile(text), timeout=within)

    def images(self):
        """The width of every generated image that the browser has decoded."""
        found = self.panel.locator(".segcn-grid img")
        return [image.evaluate("image => image.decode().then(() => image.naturalWidth)") for image in found.all()]

    def shoot(self, name):
        self.panel.screenshot(path=self.shots / f"{name}.png")
        self.page.screenshot(path=self.shots / f"{name}_page.png")


@pytest.mark.parametrize("place", ["lab", "voila"])
def test_a_person_paints_a_mask_writes_a_prompt_and_keeps_what_comes_out(place, pages, places, tmp_path):
    person, server = Person(pages[place], tmp_path), places[place]
    before = len(read_split(server.folder / "out" / "saved"))  # the notebook itself saves a row
    person.shoot("opened")

    person.panel.locator("button.segcn-class", has_text="house").click()
    person.write(PROMPT)
    person.paint((0.3, 0.7), (0.6, 0.7))
    person.press("Generate")  # at once: the stroke must not come later
    person.sees(r"Generated 1 of 1")
    assert person.images() == [128]
    person.shoot("painted")

    person.set("steps", 1000)
    person.press("Generate")
    person.sees(r"step [1-9]\d* of 1000")
    person.paint((0.3, 0.2), (0.6, 0.2))  # while the kernel is at work
    person.press("Stop")
    person.sees(r"Stopped in step \d+ of 1000; 0 of 1 generated")
    assert person.images() == [128]  # the first one is still there

    person.press("Save")
    person.sees(f"Saved as row {before} of ")
    person.set("steps", 2)
    person.press("Same mask, four captions")
    person.sees("Generated 4 of 4")
    assert person.images() == [128] * 4
    person.press("outlines")
    person.press("Save all")
    person.sees(f"Saved as row {before + 4} of ")
    person.shoot("four")
    first, *_, last = read_split(server.folder / "out" / "saved").records[before:]
    check_saved(read_split(server.folder / "out" / "saved"), first, last)
    upload_a_broken_mask(person, tmp_path)
    person.shoot("failed")
    assert person.page.evaluate("window.heard") is None
    assert_nothing_is_cut_off(person)


def check_saved(split, first, last):
    """The first image's mask has the first stroke, the last one's both; caption and settings are as given."""
    masks = [read_mask(record.mask, split.palette) for record in (first, last)]
    lower = [mask[87:92, 42:74] == HOUSE for mask in masks]
    upper = [mask[23:28, 42:74] == HOUSE for mask in masks]
    assert lower[0].all() and not upper[0].any() and lower[1].all() and upper[1].all()
    assert first.caption == PROMPT
    told = read_settings(first.image)
    assert told["prompt"] == [PROMPT] and told["settings"]["num_inference_steps"] == 2
    images = [np.asarray(Image.open(record.image)) for record in (first, last)]
    assert images[0].shape == (128, 128, 3) and images[0].std() > 5 and (images[0] != images[1]).any()


def upload_a_broken_mask(person, folder):
    (folder / BROKEN).write_bytes(b"")
    with person.page.expect_file_chooser() as chooser:
        person.panel.get_by_role("button", name=re.compile("Upload")).click()
    chooser.value.set_files(folder / BROKEN)
    person.sees(re.escape(f"Error: {BROKEN}: the mask cannot be read"))


def assert_nothing_is_cut_off(person):
    """No part of the panel reaches beyond it or the page, and no text but a caption in a list is shortened."""
    cut = person.panel.evaluate("""panel => {
        const edge = Math.min(panel.getBoundingClientRect().right, document.documentElement.clientWidth) + 1;
        const parts = [...panel.querySelectorAll("*")].filter((part) => part.getClientRects().length);
        return parts.filter((part) => part.getBoundingClientRect().right > edge
            || (part.matches("button, .widget-label") && part.scrollWidth > part.clientWidth + 1))
            .map((part) => part.outerHTML.slice(0, 120));
    }""")
    assert not cut, cut
