from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Image
from dual_encoder_helpers import SHAPES, SIDE, saved_dual_encoder, shape_image, write_lines, write_shapes
from PIL import Image as PillowImage

from na_lora_lightning.data.classes.datamodule import CropAndFlip, LabelledImageDataModule, input_side
from na_lora_lightning.data.classes.image_classes import few_of_each_class
from na_lora_lightning.errors import ConfigurationError, DataError, ImageError

NAMES = list(SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labelled")


@pytest.fixture(scope="module")
def clip(folder: Path) -> str:
    return saved_dual_encoder(folder / "clip")


@pytest.fixture(scope="module")
def shapes(folder: Path) -> str:
    return write_shapes(folder / "shapes", 5)


@pytest.fixture(scope="module")
def lines(shapes: str) -> str:
    """The same images, in the same order, in a file beside their folders."""
    records = [{"image": f"{name}/{i}.png", "label": name} for name in NAMES for i in range(5)]
    return write_lines(Path(shapes) / "shapes.jsonl", records)


def fit_data(base: str, **options: Any) -> LabelledImageDataModule:
    data = LabelledImageDataModule(base, **{"batch_size": 4, **options})
    data.setup("fit")
    return data


def images_and_labels(data: LabelledImageDataModule, epoch: int = 0) -> tuple[torch.Tensor, list[int]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches = list(loader)
    return torch.cat([b["pixel_values"] for b in batches]), torch.cat([b["label"] for b in batches]).tolist()


def test_sources_of_all_kinds_give_the_same_batches(clip: str, shapes: str, lines: str, tmp_path: Path) -> None:
    expected, labels = images_and_labels(fit_data(clip, train=shapes, shuffle=False))
    assert expected.shape == (20, 3, SIDE, SIDE)
    assert expected.dtype == torch.float32
    assert labels == [index for index in range(4) for _ in range(5)]

    files = [str(Path(shapes) / name / f"{i}.png") for name in NAMES for i in range(5)]
    records = Dataset.from_dict({"picture": files, "label": labels})
    records = records.cast_column("label", ClassLabel(names=NAMES)).cast_column("picture", Image())
    records.save_to_disk(str(tmp_path / "saved"))
    numbers = [{"image": file, "label": label} for file, label in zip(files, labels, strict=True)]
    numbered = write_lines(tmp_path / "numbers.jsonl", numbers)

    for options in (
        {"train": lines},
        {"train": str(tmp_path / "saved"), "columns": {"image": "picture"}},
        {"train": numbered, "class_names": NAMES},
        {"train": numbered, "class_names": {str(i): name for i, name in enumerate(NAMES)}},
    ):
        data = fit_data(clip, shuffle=False, **options)
        images, own = images_and_labels(data)
        assert torch.equal(images, expected)
        assert own == labels
        assert data.class_names == NAMES


def test_labels_are_renamed_and_left_out(clip: str, lines: str) -> None:
    mapping = {name: name.upper() for name in reversed(NAMES)}
    data = fit_data(clip, train=lines, shuffle=False, class_names=mapping)
    assert data.class_names == [name.upper() for name in reversed(NAMES)]
    assert images_and_labels(data)[1] == [3 - index for index in range(4) for _ in range(5)]
    with pytest.raises(DataError, match=r"has the label 'yellow_frame', which is none of the 3 classes"):
        fit_data(clip, train=lines, class_names=NAMES[:3])


def test_shots_are_drawn_of_each_class(clip: str, shapes: str) -> None:
    def drawn(seed: int, shots: int = 2) -> list[int]:
        data = fit_data(clip, train=shapes, shots=shots, seed=seed)
        dataset = data._dataset("train")
        assert dataset.classes == [index // 5 for index in dataset.indices]
        assert sorted(dataset.classes) == [index for index in range(4) for _ in range(shots)]
        return dataset.indices

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(4)}) == 4
    # More shots add to fewer, and another class changes nothing.
    assert set(drawn(0, 2)) < set(drawn(0, 4))
    classes = [0, 1, 0, 1, 0, 2]
    assert few_of_each_class(classes, ["a", "b"], 2, 0, "x") == few_of_each_class(classes[:5], ["a", "b"], 2, 0, "x")


def test_order_depends_on_seed_and_epoch(clip: str, shapes: str) -> None:
    first, again = fit_data(clip, train=shapes), fit_data(clip, train=shapes, num_workers=1)
    assert images_and_labels(first)[1] == images_and_labels(again)[1] != images_and_labels(first, epoch=1)[1]
    assert images_and_labels(fit_data(clip, train=shapes, seed=1))[1] != images_and_labels(first)[1]


def test_augmentation_is_a_function_of_seed_epoch_and_image(clip: str, shapes: str) -> None:
    data = fit_data(clip, train=shapes, augmentation=True, shuffle=False)
    plain, _ = images_and_labels(fit_data(clip, train=shapes, shuffle=False))
    first, second = images_and_labels(data)[0], images_and_labels(data, epoch=1)[0]
    assert torch.equal(first, images_and_labels(data)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    # In workers too.
    assert torch.equal(
        first, images_and_labels(fit_data(clip, train=shapes, augmentation=True, shuffle=False, num_workers=1))[0]
    )


def test_crops_stay_inside_and_half_are_mirrored() -> None:
    # Red rises from left to right and green from top to bottom: the corners tell which part is seen.
    image = PillowImage.new("RGB", (200, 100))
    image.putdata([(x, y, 0) for y in range(100) for x in range(200)])
    areas, mirrored = [], 0
    for index in range(200):
        crop = CropAndFlip(32, 0)(image, 0, index)
        (left, upper, _), (right, lower, _) = crop.getpixel((0, 0)), crop.getpixel((31, 31))  # type: ignore[misc]
        mirrored += right < left
        width, height = abs(right - left) * 32 / 31, (lower - upper) * 32 / 31
        assert height > 0
        assert 0.65 < width / height < 1.55
        areas.append(width * height / 20_000)
    assert 80 <= mirrored <= 120
    assert 0.05 < min(areas) < 0.15
    assert 0.5 < max(areas) <= 1.05
    # Nothing of the usual aspect ratios fits: the middle.
    assert CropAndFlip(8, 0)(PillowImage.new("RGB", (400, 2)), 0, 0).size == (8, 8)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_augmented_images_have_the_size_of_the_model(kind: str, tmp_path: Path) -> None:
    from dual_encoder_helpers import tiny_processor

    processor = tiny_processor(kind).image_processor
    side = input_side(processor)
    assert side == (SIDE if kind != "siglip2" else 16)
    image = shape_image("red_circle", random.Random(0), (side, side))
    assert processor(images=image, return_tensors="pt")["pixel_values"].shape[0] == 1


# ---- what is refused ----


def test_a_class_without_enough_shots_is_refused(clip: str, shapes: str) -> None:
    with pytest.raises(DataError, match=r"^the class 'blue_bar' has 5 images in '.*' and shots=6 are wanted of each;"):
        fit_data(clip, train=shapes, shots=6)


def test_an_unknown_or_missing_label_is_refused(clip: str, shapes: str, lines: str, tmp_path: Path) -> None:
    image = str(Path(shapes) / "red_circle" / "0.png")
    other = write_lines(tmp_path / "other.jsonl", [{"image": image, "label": "cow"}])
    with pytest.raises(DataError, match=r"^record 1 of '.*other.jsonl' has the label 'cow', .* \('blue_bar', .*; "):
        fit_data(clip, train=lines, validation=other)
    empty = write_lines(tmp_path / "empty.jsonl", [{"image": image, "label": "red_circle"}, {"image": image}])
    with pytest.raises(DataError, match=r"record 2 of '.*empty.jsonl' has no label"):
        fit_data(clip, train=lines, validation=empty)
    without = write_lines(tmp_path / "without.jsonl", [{"image": image}])
    with pytest.raises(DataError, match="has no labels, from which the classes could be told"):
        fit_data(clip, train=without)
    numbers = write_lines(tmp_path / "numbers.jsonl", [{"image": image, "label": 3}])
    with pytest.raises(DataError, match="are numbers, of which a prompt cannot be made"):
        fit_data(clip, train=numbers)
    with pytest.raises(DataError, match="has the label 3, which is none of the 2 classes"):
        fit_data(clip, train=numbers, class_names=["a", "b"])


def test_a_missing_or_broken_image_is_refused(clip: str, shapes: str, tmp_path: Path) -> None:
    image = str(Path(shapes) / "red_circle" / "0.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    records = [{"image": image, "label": "a"}, {"image": "gone.png", "label": "b"}]
    with pytest.raises(
        ImageError, match=r"^record 2 of '.*' has the image 'gone.png', which does not exist .*record\.$"
    ):
        fit_data(clip, train=write_lines(tmp_path / "gone.jsonl", records))
    records[1]["image"] = "broken.png"
    data = fit_data(clip, train=write_lines(tmp_path / "broken.jsonl", records))
    with pytest.raises(ImageError, match=r"^record 2 of '.*' has the image 'broken.png', which cannot be decoded"):
        images_and_labels(data)


def test_unlabelled_images_can_be_classified(clip: str, shapes: str, tmp_path: Path) -> None:
    image = str(Path(shapes) / "red_circle" / "0.png")
    data = LabelledImageDataModule(clip, predict=write_lines(tmp_path / "predict.jsonl", [{"image": image}] * 3))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"pixel_values"}
    assert len(batch["pixel_values"]) == 3
    assert data.class_names is None


def test_all_given_data_is_set_up_at_once(clip: str, shapes: str) -> None:
    data = LabelledImageDataModule(clip, validation=shapes, predict=shapes, batch_size=4, validation_batch_size=8)
    with pytest.raises(
        ConfigurationError, match=r"data for 'predict' is not set up; give data\.predict and call setup"
    ):
        data.predict_dataloader()
    data.prepare_data()
    data.setup()
    assert data.class_names == NAMES
    assert [len(batch["label"]) for batch in data.val_dataloader()] == [8, 8, 4]
    assert [set(batch) for batch in data.predict_dataloader()] == [{"pixel_values"}] * 3
    with pytest.raises(ConfigurationError, match="data for 'train' is not set up"):
        data.train_dataloader()


def test_without_data_there_is_nothing_to_set_up(clip: str) -> None:
    data = LabelledImageDataModule(clip)
    data.setup()
    assert data.class_names is None
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shots": 0}, ConfigurationError, "shots=0 is too small"),
        ({"columns": {"picture": "x"}}, ConfigurationError, "unknown key 'picture'; use 'image' and 'label'"),
        ({"class_names": ["a", "a"]}, ConfigurationError, "at least two of different names"),
        ({"train": None}, ConfigurationError, "data for 'train' is not given but is needed to fit"),
        ({"train": "/nowhere"}, DataError, "'/nowhere' does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused(
    clip: str, shapes: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_data(clip, **{"train": shapes, **options})
