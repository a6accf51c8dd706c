"""Promise: a metadata.csv of many rows is read in little memory, and a check of a data set reads each file once."""

import tracemalloc
from collections import Counter

from PIL import Image, ImageFile

from segcn.data.config import DoctorConfig
from segcn.data.doctor.findings import examine
from segcn.data.metadata import read_split
from segcn.data.palette import Label, Palette


def test_fifty_thousand_rows_take_a_kilobyte_each_at_most(tmp_path):
    Palette((Label(0, "sky", (135, 206, 235)),)).save(tmp_path / "palette.json")
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / name).mkdir()
        for number in range(100):
            Image.new(mode, (8, 8)).save(tmp_path / name / f"{number:06d}.png")
    with (tmp_path / "metadata.csv").open("w") as file:
        print("file_name,conditioning_image_file_name,text", file=file)
        for row in range(50_000):
            names = ",".join(f"{name}/{row % 100:06d}.png" for name in ("images", "masks"))
            print(f'{names},"a winter landscape at dusk with mountains, a lake, pine trees and house {row}"', file=file)
    tracemalloc.start()
    try:
        split = read_split(tmp_path)
        assert len(split) == 50_000 and tracemalloc.get_traced_memory()[1] < 50_000 * 1024
    finally:
        tracemalloc.stop()


def test_a_check_decodes_each_file_once(landscapes, monkeypatch):
    decoded, prepare = Counter(), ImageFile.ImageFile.load_prepare

    def counted(image):
        decoded[image.filename] += 1
        return prepare(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", counted)
    examine(DoctorConfig(dataset_name=str(landscapes)), log=lambda line: None)
    assert len(decoded) == 36 and set(decoded.values()) == {1}
