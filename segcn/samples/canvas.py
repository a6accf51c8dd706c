"""An antialiased canvas that keeps an image and its exact label map in step."""

import numpy as np
from PIL import Image, ImageDraw

SUBPIXELS = 3  # odd, so that the middle subpixel is the pixel's centre


def ellipse(x, y, radius_x, radius_y, corners=32):
    """Polygon [corners, 2] of an ellipse; unit coordinates, y down."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius_x * np.cos(turn), y + radius_y * np.sin(turn)], axis=1)


def rectangle(left, top, right, bottom):
    """Polygon [4, 2] of an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def rasterise(polygons, resolution):
    """Rasterise the union of polygons in unit coordinates.

    Returns None if it lies out of frame, else (box, cover, centre): box the two slices of the frame it
    touches, cover float32 [h, w, 1] the share of each pixel it covers, centre bool [h, w] whether it covers
    the pixel's centre.
    """
    corners = np.concatenate(polygons) * resolution
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, resolution)
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, resolution)
    if right <= left or bottom <= top:
        return None
    sheet = Image.new("L", (int(right - left) * SUBPIXELS, int(bottom - top) * SUBPIXELS))
    pen = ImageDraw.Draw(sheet)
    for polygon in polygons:
        points = (polygon * resolution - (left, top)) * SUBPIXELS - 0.5
        pen.polygon(points.ravel().tolist(), fill=255)
    middle = SUBPIXELS // 2
    centre = np.asarray(sheet)[middle::SUBPIXELS, middle::SUBPIXELS] > 0
    cover = np.asarray(sheet.reduce(SUBPIXELS), np.float32)[..., None] / 255
    return (slice(top, bottom), slice(left, right)), cover, centre


def smooth_noise(rng, resolution, cells_y, cells_x):
    """Low-frequency noise float32 [R, R] in about [-1, 1], the same pattern at every resolution."""
    grid = rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((resolution, resolution), Image.Resampling.BICUBIC))


class Canvas:
    """Image float32 [R, R, 3] in 0..255, labels uint8 [R, R], and the pixel centres x and y in 0..1."""

    def __init__(self, resolution):
        self.resolution = resolution
        self.image = np.zeros((resolution, resolution, 3), np.float32)
        self.labels = np.zeros((resolution, resolution), np.uint8)
        centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
        self.y, self.x = centres[:, None, None], centres[None, :, None]

    def fill(self, polygons, colour, label=None, opacity=1.0):
        """Paint the union of polygons; colour is RGB or a function of pixel centres (y [h,1,1], x [1,w,1]).

        With label None the label map stays as it is (shading, windows, snow).
        """
        raster = rasterise(polygons, self.resolution)
        if raster is None:
            return
        box, cover, centre = raster
        if callable(colour):
            colour = colour(self.y[box[0]], self.x[:, box[1]])
        self.image[box] += cover * opacity * (np.asarray(colour, np.float32) - self.image[box])
        if label is not None:
            self.labels[box][centre] = label

    def blend(self, colour, opacity):
        """Blend a colour over the whole frame; opacity broadcasts to [R, R, 1]."""
        self.image += opacity * (np.asarray(colour, np.float32) - self.image)

    def to_uint8(self):
        """Image uint8 [R, R, 3]."""
        return np.clip(np.round(self.image), 0, 255).astype(np.uint8)
