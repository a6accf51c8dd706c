"""Promise: a sweep has every pair of its settings, in folders of their own, and one image names the best."""

import numpy as np
import pytest

from segcn.data.metadata import read_split, write_metadata
from segcn.data.visualize import read_pair
from segcn.notebook import plots
from segcn.utils.errors import UserError


@pytest.fixture
def points(tmp_path, landscapes):
    """Four points; each shows other rows of the landscapes."""
    real, found = read_split(landscapes, "train"), plots.points("1,2", "0.5,1", tmp_path)
    for place, point in enumerate(found):
        folder = point.folder / "generated"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        rows = []
        for row in range(2):
            record = real[2 * place + row]
            for kind, source in (("images", record.image), ("masks", record.mask)):
                (folder / kind / f"{row}.png").write_bytes(source.read_bytes())
            rows.append((f"images/{row}.png", f"masks/{row}.png", record.captions))
        real.palette.save(folder / "palette.json")
        write_metadata(folder, rows)
    return found


def test_every_pair_has_a_folder_and_the_parameters_of_notebook_04(points):
    assert [point.folder.name for point in points] == [
        "guidance-1-mask-0.5", "guidance-1-mask-1", "guidance-2-mask-0.5", "guidance-2-mask-1",
    ]  # fmt: skip
    assert points[2].parameters == {
        "guidance_scale": 2.0, "controlnet_conditioning_scale": 0.5, "output_dir": str(points[2].folder),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,-2"])
def test_what_is_no_number_above_0_is_refused_by_name(text, tmp_path):
    with pytest.raises(UserError, match="controlnet_conditioning_scales: expected numbers above 0"):
        plots.points("1", text, tmp_path)


def test_one_picture_shows_the_same_row_of_each_point_and_names_the_highest(points):
    figure = plots.sweep_figure(points, [0.25, 0.5, 0.75, 0.125], row=1)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for image, point in zip(shown, points, strict=True):
        assert np.array_equal(image, read_pair(point.generated(2), 1)[0])
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "mIoU 0.750, the highest" in words and words.count("highest") == 1
    assert all(word in words for word in ("guidance 1", "guidance 2", "mask weight 0.5", "mask weight 1", "0.125"))
