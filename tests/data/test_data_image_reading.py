"""Decoding single images, and counting and finding the images of records."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from module_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from PIL import Image
from vision_helpers import picture, write_pictures

from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.record_images import RecordImages, folder_of
from na_lora_lightning.errors import DataError, ImageError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> Any:
    assert image.mode == "RGB"
    return np.asarray(image)


def huge_png(side: int) -> bytes:
    """The header of a picture of any size, followed by next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- what is read ----


def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    image = picture(0)
    content = encoded(image)
    (tmp_path / "a.png").write_bytes(content)
    ways: list[Any] = [
        "a.png",
        str(tmp_path / "a.png"),
        content,
        image,
        {"path": "a.png", "bytes": None},
        {"path": "a.png"},
        {"path": "elsewhere.png", "bytes": content},
        {"bytes": content},
    ]
    for value in ways:
        assert np.array_equal(pixels(ImageReader(tmp_path).read(value)), np.asarray(image)), value


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 2)), (3, (1, 2)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (8, (2, 0))],
)
@pytest.mark.parametrize("longest_side", [None, 3])
def test_exif_orientation_turns_an_image_upright(
    orientation: int, corner: tuple[int, int], longest_side: int | None, tmp_path: Path
) -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = pixels(ImageReader(tmp_path, longest_side=longest_side).read(encoded(image, exif=exif)))
    assert read.shape == ((2, 3, 3) if orientation < 5 else (3, 2, 3))
    assert tuple(read[corner]) == RED
    assert read.sum() == 255


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("LA", (1, 1), (9, 0)), WHITE),
        (Image.new("L", (1, 1), 7), (7, 7, 7)),
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
        (Image.fromarray(np.full((1, 1), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
    ],
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, expected: tuple[int, int, int], tmp_path: Path) -> None:
    reader = ImageReader(tmp_path)
    assert tuple(pixels(reader.read(image))[0, 0]) == expected
    if image.mode != "CMYK":
        assert tuple(pixels(reader.read(encoded(image)))[0, 0]) == expected


def test_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    read = pixels(ImageReader(tmp_path).read(encoded(image, transparency=b"\xff\x00")))
    assert [tuple(value) for value in read[0]] == [RED, WHITE]


def test_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, WHITE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(pixels(ImageReader(tmp_path).read(content))[0, 0]) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_larger_images_are_shrunk_in_proportion(kind: str, tmp_path: Path) -> None:
    reader = ImageReader(tmp_path, longest_side=20)
    assert reader.read(encoded(picture(0, 100, 50), kind)).size == (20, 10)
    assert reader.read(encoded(picture(0, 30, 90), kind)).size == (7, 20)
    assert reader.read(encoded(picture(0, 20, 5), kind)).size == (20, 5)
    original = picture(0, 100, 50)
    assert reader.read(original).size == (20, 10)
    assert original.size == (100, 50)


# ---- what is refused ----


def test_size_is_checked_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    before = Image.MAX_IMAGE_PIXELS
    for side in (7072, 100_000):
        with pytest.raises(
            ImageError,
            match=r"^has the image number 1, which has more pixels than max_image_pixels=50000000; shrink it or",
        ):
            ImageReader(tmp_path).read(huge_png(side))
    assert before == Image.MAX_IMAGE_PIXELS


def test_limits_are_inclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(0)
    content = encoded(image)
    assert ImageReader(tmp_path, max_pixels=1200).read(content).size == (40, 30)
    assert ImageReader(tmp_path, max_bytes=len(content)).read(content).size == (40, 30)
    reader = ImageReader(tmp_path, max_pixels=1199)
    with pytest.raises(ImageError, match="more pixels than max_image_pixels=1199"):
        reader.read(content)
    with pytest.raises(
        ImageError, match=r"number 2 of 40×30 pixels, more than max_image_pixels=1199; shrink it or raise"
    ):
        reader.read(image, 2)
    # Pillow's own limit does not stand in the way of a larger one.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert ImageReader(tmp_path).read(content).size == (40, 30)


def test_file_size_is_checked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(bytes(1001))
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(
        ImageError, match=r"^has the image 'a\.png' of 1,001 bytes, more than max_image_bytes=1000; shrink it or raise"
    ):
        ImageReader(tmp_path, max_bytes=1000).read("a.png")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("absent.png", r"has the image 'absent\.png', which does not exist in '.*'; correct its path"),
        ("", "has the image '', which does not exist in"),
        (".", r"has the image '\.', which does not exist in"),
        ({"path": "absent.png", "bytes": None}, r"has the image 'absent\.png', which does not exist"),
        (
            "https://example.org/a.png",
            r"has the image 'https://.*', which is on the web; download it and give its path",
        ),
        ("text.png", r"'text\.png', which cannot be decoded \(it is of no kind that Pillow knows\); replace it"),
        ("empty.png", r"'empty\.png', which cannot be decoded \(it is of no kind that Pillow knows\); replace it"),
        ("cut.png", r"'cut\.png', which cannot be decoded \(.*\); replace it"),
        (b"", r"the image number 1, which cannot be decoded"),
        ({"path": "named.png", "bytes": b"?"}, r"the image 'named\.png', which cannot be decoded"),
        (None, "has an image that is null; give its path, or a dictionary with 'bytes' or 'path'"),
        ({"path": None, "bytes": None}, "has an image that is null; give"),
        (5, "has an image that is of type int; give"),
    ],
)
def test_image_that_cannot_be_used(value: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(encoded(picture(0))[:2000])
    with pytest.raises(ImageError, match=reason) as raised:
        ImageReader(tmp_path).read(value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_arbitrary_bytes_raise_nothing_else(kind: str, tmp_path: Path) -> None:
    reader, generator = ImageReader(tmp_path, max_pixels=10**6), random.Random(0)
    content = encoded(picture(0), kind)
    failures = 0
    for number in range(80):
        damaged = bytearray(content if number % 2 else content[: generator.randrange(len(content))])
        for _ in range(generator.randrange(1, 9) if number % 2 else 0):
            damaged[generator.randrange(min(len(damaged), 200))] = generator.randrange(256)
        try:
            assert reader.read(bytes(damaged)).mode == "RGB"
        except ImageError:
            failures += 1
    assert failures > 20


# ---- the images of records ----


def images_of(records: Dataset, folder: Path) -> RecordImages:
    return RecordImages(records, "data", ImageReader(folder))


def test_survey_counts_images_and_names_what_is_missing(tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path, 2)
    rows = [{"images": [a, b]}, {"images": []}, {"images": None}, {"images": [a, "no.png", "nor.png"]}, {"images": [b]}]
    for features in (None, Features({"images": List(datasets.Image())})):
        images = images_of(Dataset.from_list(rows, features=features), tmp_path)
        counts, missing = images.survey()
        assert counts == [2, 0, 0, 3, 1]
        assert list(missing) == [3]
        assert missing[3].startswith("record 4 of 'data' has the image 'no.png', which does not exist in")
        assert [image.size for image in images.read(0, 2)] == [(24, 24), (29, 31)]
        assert [len(images.read(index, count)) for index, count in ((0, 1), (1, 0), (2, 0))] == [1, 0, 0]
        with pytest.raises(ImageError, match=r"^record 4 of 'data' has the image 'no\.png', which does not exist"):
            images.read(3, 3)


def test_one_image_or_several(tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path, 2)
    rows = [{"image": a, "images": None}, {"image": None, "images": [a, b]}, {"image": "no.png", "images": [b]}]
    images = images_of(Dataset.from_list(rows), tmp_path)
    assert images.survey() == ([1, 2, 1], {})
    assert images.read(2, 1)[0].size == (29, 31)
    with pytest.raises(
        DataError, match=r"^the data 'x' has no column 'image' or 'images' \(its columns are 'picture'\);"
    ):
        RecordImages(Dataset.from_dict({"picture": [a]}), "x", ImageReader(tmp_path))


@pytest.mark.parametrize("as_list", [False, True])
def test_images_in_the_data_are_counted_without_being_read(
    as_list: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [{"bytes": encoded(picture(0))}, None, {"path": "no.png"}]
    feature = datasets.Image()
    column = [[value, value] if value else None for value in values] if as_list else values
    records = Dataset.from_dict({"image": column}, features=Features({"image": List(feature) if as_list else feature}))
    images = images_of(records, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(Dataset, "__getitem__", None)
        counts, missing = images.survey()
    assert counts == ([2, 0, 2] if as_list else [1, 0, 1])
    assert list(missing) == [2]
    assert images.read(0, 1)[0].size == (40, 30)


def test_dictionaries_and_bytes_of_other_columns(tmp_path: Path) -> None:
    (a,) = write_pictures(tmp_path, 1)
    features = Features({"image": Value("binary")})
    images = images_of(Dataset.from_dict({"image": [encoded(picture(0))]}, features=features), tmp_path)
    assert (images.survey(), images.read(0, 1)[0].size) == (([1], {}), (40, 30))
    images = images_of(Dataset.from_list([{"image": {"path": a}}, {"image": {"path": "no.png"}}]), tmp_path)
    assert images.survey()[0] == [1, 1]
    assert list(images.survey()[1]) == [1]
    assert images.read(0, 1)[0].size == (24, 24)


def test_paths_begin_at_the_folder_of_the_data(tmp_path: Path) -> None:
    (name,) = write_pictures(tmp_path / "pictures", 1)
    source = write_jsonl(tmp_path / "data.jsonl", [{"image": f"pictures/{name}"}])
    for named in (source, f"{source}:train[:1]"):
        assert folder_of(named) == tmp_path
        images = images_of(load_records(named, default_split="train"), folder_of(named))
        assert images.survey() == ([1], {})
    assert folder_of(str(tmp_path)) == folder_of(f"{tmp_path}:train") == tmp_path
    assert folder_of("owner/name") == Path()
