import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from helpers.errors import InputError
from helpers.training.data import (
    DataError,
    PhotoLoader,
    evaluation_share,
    folder_splits,
    training_share,
)
from helpers.training.distributed import Processes
from helpers.training.image_folder import ENDINGS, broken_images, list_images, read_image
from helpers.training.loop import evaluate


def write(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two classes with ten images each in train/, and two in val/."""
    for part, count in (("train", 10), ("val", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                write(tmp_path / part / name / f"{number}.jpg", seed=number)
    return tmp_path


def splits(folder, **changes):
    arguments = {"validation_images": 4, "train_batch_size": 4, "batch_size": 3, "image_size": 16}
    return folder_splits(folder, **(arguments | changes))


def test_a_folder_is_split_into_the_three_parts(photos):
    found = splits(photos)
    assert repr(found) == "16 train, 4 validation, 4 test images in 2 classes"
    assert found.classes == ["cat", "dog"]
    images, labels = next(iter(found.train))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert isinstance(found.train, PhotoLoader)
    assert [len(batch) for _, batch in found.test] == [3, 1]


def test_one_image_in_twenty_is_held_out_unless_told(photos):
    assert len(splits(photos, validation_images=None).validation.dataset) == 1


def test_images_travel_as_bytes_and_are_normalised_once(photos):
    found = splits(photos)
    pixels, _ = found.test.dataset[0]
    assert pixels.dtype == torch.uint8
    images, _ = next(iter(found.test))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images[0].cpu(), expected)


def test_order_and_augmentation_depend_on_the_epoch_alone(photos):
    """Not on the number of workers, nor on whether they have lived through an epoch before."""

    def epochs(workers, seeds):
        loader, found = splits(photos, workers=workers).train, []
        for seed in seeds:
            torch.manual_seed(seed)
            found.append(torch.cat([images for images, _ in loader]))
        return found

    first, second = epochs(0, [1, 2])
    assert not torch.equal(first, second)
    assert torch.equal(epochs(2, [1, 2])[1], second)
    assert torch.equal(epochs(1, [2])[0], second)


def test_workers_are_not_forked_from_the_training(photos):
    """They would wait for ever for what a thread had locked in that moment."""
    loader, two = splits(photos, workers=1).train, Processes(0, 2)
    for own in (loader, training_share(loader, two), evaluation_share(loader, two)):
        assert own.multiprocessing_context.get_start_method() in ("forkserver", "spawn")
        assert len(next(iter(own))[1]) in (2, 4)


def test_loading_leaves_the_generator_alone(photos):
    found = splits(photos)
    state = torch.get_rng_state()
    found.train.dataset[0]
    assert torch.equal(state, torch.get_rng_state())


# --- what is missing ---


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val" / "dog").rename(f / "dog"), r"val has no folder dog, which is one"),
        (lambda f: (f / "val" / "emu").mkdir(), r"val has a folder emu, which is none of the 2"),
        (lambda f: [p.unlink() for p in (f / "train" / "cat").iterdir()], r"train/cat has no ima"),
        (lambda f: (f / "val").rename(f / "test"), r"val is missing"),
        (lambda f: (f / "train").rename(f / "training"), r"train is missing"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(photos, spoil, message):
    spoil(photos)
    with pytest.raises(InputError, match=message) as caught:
        splits(photos)
    assert "\n" not in str(caught.value)


def test_the_endings_are_those_of_torchvision():
    assert sorted(ENDINGS) == sorted(IMG_EXTENSIONS)


def test_a_folder_without_folders_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no folders"):
        list_images(tmp_path)


def test_too_few_images_to_hold_out_are_told(photos):
    with pytest.raises(DataError, match="has 20 images, too few to hold 20 of them out"):
        splits(photos, validation_images=20)


# --- what is broken ---


def spoil(photos):
    truncated = photos / "train" / "cat" / "3.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    (photos / "val" / "dog" / "1.jpg").write_text("no image")
    (photos / "train" / "dog" / "0.jpg").write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_counted_and_left_out(photos, caplog, workers):
    spoil(photos)
    caplog.set_level(logging.WARNING, "helpers")
    found = splits(photos, workers=workers)
    assert repr(found) == "14 train, 4 validation, 3 test images in 2 classes"
    train, val = (record.getMessage() for record in caplog.records)
    assert train.startswith("2 of 20 images of ")
    assert "cat/3.jpg (image file is truncated" in train
    assert "dog/0.jpg (cannot identify image file 'dog/0.jpg')" in train
    assert val.startswith("1 of 4 images of ")
    assert "dog/1.jpg" in val
    assert sum(len(labels) for _, labels in found.test) == 3
    assert evaluate(torch.nn.Flatten(), found.test).total == 3


def test_the_check_is_not_repeated_until_an_image_changes(photos, tmp_path, monkeypatch):
    spoil(photos)
    images, record = list_images(photos / "train"), tmp_path / "run" / "images.json"
    found = broken_images(images, 0, record)
    assert list(found) == ["cat/3.jpg", "dog/0.jpg"]
    reads = []
    real = read_image
    monkeypatch.setattr(
        "helpers.training.image_folder.read_image", lambda path: reads.append(path) or real(path)
    )
    assert broken_images(images, 0, record) == found
    assert reads == []
    write(photos / "train" / "cat" / "3.jpg", size=(41, 30))
    os.utime(photos / "train" / "cat" / "3.jpg", (1, 1))
    assert list(broken_images(images, 0, record)) == ["dog/0.jpg"]
    assert len(reads) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_in_one_sentence(photos, workers):
    found = splits(photos, workers=workers)
    spoil(photos)
    with pytest.raises(DataError, match=r"^\S+1\.jpg cannot be read \(cannot identify.*again\.$"):
        list(found.test)


# --- what is unusual ---


def test_cmyk_palettes_and_grey_are_converted(tmp_path):
    grey = Image.linear_gradient("L")
    for mode, suffix in (
        ("CMYK", "jpg"),
        ("P", "png"),
        ("L", "png"),
        ("RGBA", "png"),
        ("1", "png"),
    ):
        path = tmp_path / f"{mode}.{suffix}"
        grey.convert("RGB").convert(mode).save(path)
        image = read_image(path)
        assert image.mode == "RGB"
        assert image.size == (256, 256)
        low, high = image.convert("L").getextrema()
        assert low < 20
        assert high > 235


def test_the_upper_bits_of_16_bit_grey_remain(tmp_path):
    values = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = np.asarray(read_image(tmp_path / "deep.png"))
    assert np.array_equal(image, (values >> 8).astype(np.uint8)[..., None].repeat(3, -1))


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="32-bit numbers without a known range"):
        read_image(tmp_path / "float.tiff")
