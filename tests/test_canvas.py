"""Promise: each tool of the canvas, by mouse and by keys, leaves exactly the ids that it should, in a real browser."""

import json

import numpy as np
import pytest
from conftest import CHROMIUM

from segcn.notebook import canvas

if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)
pytest.importorskip("pytest_playwright", reason="no pytest-playwright here: pip install -e '.[test]'")

HOUSE, SKY, TREE, UNLABELLED = 8, 0, 7, 255
SIDE = 32  # px of the mask; on the screen 512
LABELS = [{"id": id, "name": name, "color": [10 * id % 256, 80, 90]}
          for id, name in ((SKY, "sky"), (TREE, "tree"), (HOUSE, "house"), (UNLABELLED, "unlabelled"))]  # fmt: skip
PAGE = f"""<body data-voila="voila"><link rel="stylesheet" href="mask_canvas.css">
<div class="segcn-panel" style="--pane: 512px"><div id="here"></div><textarea></textarea></div>
<script type="module">
import widget from "./mask_canvas.js";
const state = {{labels: {json.dumps(LABELS)}, eraser: {UNLABELLED}, width: {SIDE}, height: {SIDE},
                ids: new DataView(new ArrayBuffer({SIDE * SIDE})), photo: new DataView(new ArrayBuffer(0))}};
const listeners = {{}};
window.sent = [];
window.downloads = [];
window.model = {{
  get: (name) => state[name], set: (name, value) => (state[name] = value), on: (name, act) => (listeners[name] = act),
  send: (content, _, buffers) => window.sent.push({{...content, ids: buffers && [...new Uint8Array(buffers[0])]}}),
  put: (name, value) => {{ state[name] = value; listeners[`change:${{name}}`](); }},
  hear: (content, buffers) => listeners["msg:custom"](content, buffers),
}};
widget.render({{model: window.model, el: document.getElementById("here")}});
window.ready = true;
</script>"""


class Canvas:
    """A canvas in a page of its own, without a kernel: what it would send to one is read back."""

    def __init__(self, page):
        self.page, self.paper = page, page.locator(".segcn-paper")
        page.route("**/*", self.answer)
        page.goto("http://127.0.0.1/")
        page.wait_for_function("window.ready")
        box = self.paper.bounding_box()
        assert (box["width"], box["height"]) == (512, 512)
        self.left, self.top = box["x"], box["y"]

    @staticmethod
    def answer(route):
        name = route.request.url.rsplit("/", 1)[1]
        kinds = {"": "text/html", "mask_canvas.js": "text/javascript", "mask_canvas.css": "text/css"}
        body = PAGE if not name else (canvas.HERE / name).read_text() if name in kinds else ""
        route.fulfill(body=body, content_type=kinds.get(name, "text/plain"))

    def clear(self):
        """A mask of sky, brush and house, without a past."""
        self.page.keyboard.press("Escape")
        for size in (SIDE + 8, SIDE):
            self.page.evaluate(f"""() => {{
                model.set("width", {size}); model.set("height", {size});
                model.put("ids", new DataView(new ArrayBuffer({size * size})));
            }}""")
        self.page.evaluate("sent.length = 0")
        self.paper.focus()
        for key in ("b", "3", *"[" * 9):
            self.page.keyboard.press(key)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def at(self, x, y):
        """The middle of a pixel on the screen, without zoom."""
        return self.left + (x + 0.5) * 512 / SIDE, self.top + (y + 0.5) * 512 / SIDE

    def drag(self, *pixels):
        self.page.mouse.move(*self.at(*pixels[0]))
        self.page.mouse.down()
        for pixel in pixels[1:]:
            self.page.mouse.move(*self.at(*pixel))
        self.page.mouse.up()

    def click(self, *pixels):
        for pixel in pixels:
            self.page.mouse.click(*self.at(*pixel))

    def ids(self):
        """The ids that were sent last, uint8 [H, W]."""
        ids = self.page.evaluate("sent.filter((one) => one.kind === 'drawn').at(-1).ids")
        return np.array(ids, np.uint8).reshape(SIDE, SIDE)

    def count(self):
        return self.page.evaluate("sent.length")


@pytest.fixture(scope="module")
def shown(browser, browser_context_args):
    page = browser.new_context(**browser_context_args).new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield Canvas(page)
    page.context.close()
    assert not errors


@pytest.fixture
def paper(shown):
    shown.clear()
    return shown


def blank(*boxes, id=HOUSE):
    """A mask of sky with boxes (left, top, right, bottom), the last pixels included."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for left, top, right, bottom in boxes:
        mask[top : bottom + 1, left : right + 1] = id
    return mask


def test_brush_and_eraser_draw_pixels_of_their_class(paper):
    paper.drag((4, 10), (20, 10))
    assert (paper.ids() == blank((4, 10, 20, 10))).all()
    paper.press("]", "]")  # 3 px
    paper.click((10, 20))
    assert (
        paper.ids()[19:22, 9:12].tolist() == [[SKY, HOUSE, SKY], [HOUSE] * 3, [SKY, HOUSE, SKY]]
        or (paper.ids()[19:22, 9:12] == HOUSE).all()
    )
    paper.press("e", "[", "[")
    paper.drag((6, 10), (8, 10))
    assert (paper.ids()[10, 4:21] == [HOUSE] * 2 + [UNLABELLED] * 3 + [HOUSE] * 12).all()


def test_line_and_rectangle_are_what_was_dragged_last(paper):
    paper.press("l")
    paper.drag((2, 2), (9, 30), (30, 2))  # on its way somewhere else
    assert (paper.ids() == blank((2, 2, 30, 2))).all()
    paper.press("r")
    paper.drag((20, 20), (3, 30), (12, 10))  # upwards
    assert (paper.ids() == blank((2, 2, 30, 2), (12, 10, 20, 20))).all()
    assert paper.count() == 2  # one message a change


def inside(corners):
    """Where a pixel's center is inside a polygon, by the even-odd rule; corners: middles of pixels."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    odd = np.zeros((SIDE, SIDE), bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ax, ay, bx, by = ax + 0.5, ay + 0.5, bx + 0.5, by + 0.5
        with np.errstate(all="ignore"):
            odd ^= ((ay > y) != (by > y)) & (x >= ax + (y - ay) * (bx - ax) / (by - ay))
    return odd


@pytest.mark.parametrize("how", ["Enter", "double click", "first corner"])
def test_a_polygon_holds_the_pixels_whose_centers_are_inside(paper, how):
    corners = [(4, 3), (27, 8), (15, 28)]
    paper.press("p")
    paper.click(*corners)
    assert paper.count() == 0  # nothing is sent before it is closed
    if how == "Enter":
        paper.press("Enter")
    elif how == "first corner":
        paper.click(corners[0])
    else:
        paper.page.mouse.dblclick(*paper.at(*corners[-1]))
    assert (paper.ids() == np.where(inside(corners), HOUSE, SKY)).all()


def test_an_open_polygon_can_be_dropped_and_a_lasso_is_a_polygon_that_is_drawn(paper):
    paper.press("p")
    paper.click((4, 3), (27, 8), (15, 28))
    paper.press("Escape", "o")
    around = [(5, 5), (25, 5), (25, 25), (5, 25)]
    paper.drag(*around)
    assert paper.count() == 1 and (paper.ids() == np.where(inside(around), HOUSE, SKY)).all()


def test_fill_stays_in_its_area_and_the_eyedropper_takes_its_class(paper):
    paper.press("r")
    paper.drag((8, 8), (16, 16))
    paper.press("2", "f")
    paper.click((10, 10))
    assert (paper.ids() == blank((8, 8, 16, 16), id=TREE)).all()
    paper.press("1", "i")
    paper.click((9, 9))
    assert paper.page.locator("button.segcn-class[aria-pressed=true]").inner_text() == "tree"
    paper.drag((0, 31), (3, 31))  # the brush is back
    assert (paper.ids()[31, :5] == [TREE] * 4 + [SKY]).all()


def test_undo_and_redo_by_keys(paper):
    paper.click((1, 1))
    one = paper.ids()
    paper.click((5, 5))
    two = paper.ids()
    for keys, expected in ((["Control+z"], one), (["Control+z"], blank()), (["Control+y", "Control+Shift+z"], two)):
        paper.press(*keys)
        assert (paper.ids() == expected).all()


def test_zoom_and_pan_do_not_move_what_is_drawn(paper):
    paper.page.mouse.move(*paper.at(8, 8))
    paper.press("+", "+")
    paper.press("h")
    paper.drag((16, 16), (18, 18))
    paper.press("b")
    box = paper.page.locator("canvas").bounding_box()
    assert box["width"] == pytest.approx(512 * 2.25)
    scale = box["width"] / SIDE
    paper.page.mouse.click(box["x"] + 12.5 * scale, box["y"] + 12.5 * scale)
    assert (paper.ids() == blank((12, 12, 12, 12))).all()
    paper.press("0")
    assert paper.page.locator("canvas").bounding_box()["width"] == 512


def test_keys_alone_draw_and_all_keys_are_listed(paper):
    paper.press(" ", "ArrowRight", "ArrowRight", " ", "ArrowDown", ".", "Space")
    expected = blank((16, 16, 18, 16))
    expected[17, 18] = UNLABELLED
    paper.press("Space")
    assert (paper.ids() == expected).all()
    listed = paper.page.locator(".segcn-keys")
    assert not listed.is_visible()
    paper.press("?")
    assert listed.is_visible() and "Ctrl + Enter" in listed.inner_text() and "Polygon" in listed.inner_text()
    paper.press("?")


def test_ctrl_enter_generates_from_anywhere_in_the_panel(paper):
    paper.press("Control+Enter")
    paper.page.locator("textarea").focus()
    paper.press("Control+Enter")
    assert paper.page.evaluate("sent.map((one) => one.kind)") == ["generate", "generate"]


def test_a_photo_shows_through_and_files_are_handed_out(paper):
    slider = paper.page.locator("input[title^='how much of the photo']")
    assert not slider.is_visible()
    paper.page.evaluate("model.put('photo', new DataView(new Uint8Array([1, 2, 3]).buffer))")
    assert slider.is_visible()
    slider.fill("70")
    assert paper.page.locator("canvas").evaluate("canvas => canvas.style.opacity") == "0.3"
    paper.page.evaluate("model.put('photo', new DataView(new ArrayBuffer(0)))")
    assert paper.page.locator("canvas").evaluate("canvas => canvas.style.opacity") == "1"
    with paper.page.expect_download() as download:
        paper.page.evaluate(
            "model.hear({kind: 'download', name: 'mask.png'}, [new DataView(new Uint8Array([7, 8]).buffer)])"
        )
    assert download.value.suggested_filename == "mask.png" and download.value.path().read_bytes() == b"\x07\x08"


def test_what_arrives_from_the_kernel_can_be_undone_and_drops_what_is_being_drawn(paper):
    paper.press("p")
    paper.click((4, 3), (27, 8))
    paper.page.evaluate(f"model.put('ids', new DataView(new Uint8Array({SIDE * SIDE}).fill(7).buffer))")
    paper.press("Control+z")
    assert (paper.ids() == blank()).all()
