import io
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST, Imagenette

from helpers.training.data import DataError, first_images
from helpers.tutorial.inputs import load_splits
from helpers.tutorial.settings import Settings, project_root

RAW = project_root() / "data" / "FashionMNIST" / "raw"
WNIDS = list(Imagenette._WNID_TO_CLASS)


# The quick preset, on the images of the repository.


@pytest.fixture(scope="module")
def splits():
    preset = Settings.load("quick")
    return load_splits(replace(preset, data_dir=project_root() / "data"))


def test_fashion_mnist_is_split_into_55000_5000_and_10000_images(splits):
    assert [len(part.dataset) for part in (splits.train, splits.validation, splits.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    assert repr(splits) == "55,000 train, 5,000 validation, 10,000 test images in 10 classes"


def test_validation_and_training_images_are_disjoint_and_together_all(splits):
    train, validation = set(splits.train.dataset.indices), set(splits.validation.dataset.indices)
    assert not train & validation
    assert train | validation == set(range(60_000))


def test_batches_are_normalised_float_images_and_whole_labels(splits):
    images, labels = next(iter(splits.train))
    assert images.shape == (128, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.shape == (128,)
    assert labels.dtype == torch.int64


def test_training_images_have_mean_zero_and_deviation_one(splits):
    images = splits.train.dataset.dataset.images
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


def test_every_class_is_in_every_split_about_equally_often(splits):
    _, labels = first_images(splits.validation, 5_000)
    assert labels.bincount(minlength=10).min() > 400
    _, labels = first_images(splits.test, 10_000)
    assert labels.bincount().tolist() == [1_000] * 10


def test_no_batch_of_the_test_is_larger_than_the_engine_takes(splits):
    assert max(Settings.load("quick").batch_sizes) >= next(iter(splits.test))[0].shape[0]


def test_the_seed_determines_order_and_augmentation(splits):
    def first_batch(seed):
        torch.manual_seed(seed)
        return next(iter(splits.train))

    images, labels = first_batch(1)
    again, same_labels = first_batch(1)
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(labels, first_batch(2)[1])


def test_only_training_images_are_mirrored(splits):
    def images(part, seed):
        torch.manual_seed(seed)
        return part.dataset.__getitems__(list(range(64)))[0]

    one, other = images(splits.train, 1), images(splits.train, 2)
    same = (one == other).flatten(1).all(1)
    mirrored = (one == other.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0 < same.sum() < 64
    for part in (splits.validation, splits.test):
        assert torch.equal(images(part, 1), images(part, 2))


def test_mirroring_a_batch_leaves_the_stored_images_alone(splits):
    stored = splits.train.dataset.dataset.images
    index = splits.train.dataset.indices[:64]
    before = stored[index].clone()
    for seed in range(3):
        torch.manual_seed(seed)
        splits.train.dataset.__getitems__(list(range(64)))
    assert torch.equal(stored[index], before)


def test_first_images_cuts_across_batches(splits):
    images, labels = first_images(splits.test, 300)
    assert len(images) == len(labels) == 300
    expected = splits.test.dataset.__getitems__(list(range(300)))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


# The quick preset, on small files in the same format.


def write_idx(path, shape):
    numbers = torch.arange(torch.tensor(shape).prod()) % 10
    header = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
    path.write_bytes(header + bytes(numbers.tolist()))


@pytest.fixture
def small(settings, tmp_path):
    """The quick preset on 30 training and 20 test images, 10 of them held out."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", (count, 28, 28))
        write_idx(raw / f"{part}-labels-idx1-ubyte", (count,))
    recipe = replace(settings.recipe, batch_size=8)
    return replace(settings, data_dir=tmp_path / "data", validation_images=10, recipe=recipe)


def refusal(settings):
    with pytest.raises(DataError) as error:
        load_splits(settings)
    return str(error.value)


def test_the_split_is_determined_by_the_seed_of_the_settings(small):
    first, again, other = (
        load_splits(replace(small, seed=seed)).validation.dataset.indices for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_training_drops_the_last_incomplete_batch_and_the_test_does_not(small):
    splits = load_splits(small)
    assert [len(labels) for _, labels in splits.train] == [8, 8]
    assert sum(len(labels) for _, labels in splits.test) == 20


def test_worker_processes_give_the_same_batches(small):
    alone = list(load_splits(small).test)
    helped = list(load_splits(replace(small, workers=1)).test)
    assert all(torch.equal(a, b) for a, b in zip(alone[0], helped[0], strict=True))


def test_too_few_images_for_the_validation_split_are_refused(small):
    message = refusal(replace(small, validation_images=30))
    assert message.startswith(f"FashionMNIST has 30 training images in {small.data_dir}, too few")
    assert "\n" not in message


@pytest.mark.parametrize("name", [name for name, _ in FashionMNIST.resources])
def test_a_truncated_archive_is_named(small, name):
    raw = small.data_dir / "FashionMNIST" / "raw"
    content = (RAW / name).read_bytes()
    (raw / name).write_bytes(content[: len(content) // 2])
    message = refusal(small)
    assert message.startswith(f"{raw / name} is damaged")
    assert "git checkout" in message
    assert "\n" not in message


@pytest.mark.parametrize("part", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3"])
@pytest.mark.parametrize("keep", [0, 3, 10, 30])
def test_a_corrupted_unpacked_file_is_refused(small, part, keep):
    path = small.data_dir / "FashionMNIST" / "raw" / f"{part}-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(small)
    assert message.startswith(f"Fashion-MNIST could not be read from {path.parent} (")
    assert "Delete any file there that does not end in .gz" in message


def test_an_interrupted_unpacking_is_repaired(settings, tmp_path):
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in FashionMNIST.resources:
        shutil.copy(RAW / name, raw)
    (raw / "train-images-idx3-ubyte").write_bytes(b"half of it")
    assert len(load_splits(replace(settings, data_dir=tmp_path / "data")).test.dataset) == 10_000


def test_missing_images_without_a_network_are_told(settings, tmp_path, no_network):
    message = refusal(replace(settings, data_dir=tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    assert message.startswith(f"Fashion-MNIST could not be read from {raw} (")
    assert "git checkout -- data/FashionMNIST" in message


def test_missing_images_are_told_in_one_line(settings, tmp_path, no_network):
    assert "\n" not in refusal(replace(settings, data_dir=tmp_path))


# Photographs.


def jpeg(shade):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((60, 48)).point(lambda p: p * shade // 255).convert(
        "RGB"
    ).save(file, "JPEG")
    return file.getvalue()


def write_photos(folder, classes, count):
    content = [jpeg(60 * (i + 1)) for i in range(count)]
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{name}_{i}.JPEG").write_bytes(content[i])


def photo_settings(preset, folder):
    preset = Settings.load(preset)
    recipe = replace(preset.recipe, batch_size=4)
    small = {"validation_images": 8, "batch_sizes": (1, 4), "workers": 0}
    return replace(preset, data_dir=folder, recipe=recipe, **small)


@pytest.fixture
def imagenette(tmp_path):
    write_photos(tmp_path / "imagenette2-320" / "train", WNIDS, 3)
    write_photos(tmp_path / "imagenette2-320" / "val", WNIDS, 1)
    return photo_settings("imagenette", tmp_path)


def check_photo_batches(splits):
    for part in (splits.train, splits.validation, splits.test):
        images, labels = next(iter(part))
        assert images.shape[1:] == (3, 224, 224)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
    assert len(next(iter(splits.train))[1]) == 4
    assert not set(splits.train.dataset.indices) & set(splits.validation.dataset.indices)


def test_imagenette_gives_224_pixel_float_batches(imagenette):
    splits = load_splits(imagenette)
    assert repr(splits) == "22 train, 8 validation, 10 test images in 10 classes"
    assert splits.classes[0] == "tench"
    check_photo_batches(splits)


def test_imagenette_gives_the_same_batches_from_worker_processes(imagenette):
    images, labels = next(iter(load_splits(imagenette).test))
    again, same_labels = next(iter(load_splits(replace(imagenette, workers=1)).test))
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)


def test_only_training_photographs_are_augmented(imagenette):
    splits = load_splits(imagenette)

    def first(part, seed):
        photos = part.dataset.dataset if part is not splits.test else part.dataset
        photos.seed.fill_(seed)
        return photos[0][0]

    assert torch.equal(first(splits.train, 1), first(splits.train, 1))
    assert not torch.equal(first(splits.train, 1), first(splits.train, 2))
    for part in (splits.validation, splits.test):
        assert torch.equal(first(part, 1), first(part, 2))


def test_too_few_photographs_for_the_validation_split_are_refused(imagenette):
    message = refusal(replace(imagenette, validation_images=1_000))
    assert message.startswith("Imagenette has 30 training images")
    assert "\n" not in message


def test_a_missing_imagenette_without_a_network_is_told(tmp_path, no_network):
    message = refusal(photo_settings("imagenette", tmp_path))
    assert message.startswith(f"Imagenette could not be read from {tmp_path} or downloaded (")
    assert (
        "Unpack imagenette2-320.tgz there, or give the folder that holds imagenette2-320/"
        in message
    )
    assert "\n" not in message


def test_an_imagenette_without_its_training_images_is_refused(imagenette):
    shutil.rmtree(imagenette.data_dir / "imagenette2-320" / "train")
    assert refusal(imagenette).startswith("Imagenette could not be read from")


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_imagenette_with_an_empty_class_is_refused(imagenette, part):
    for path in (imagenette.data_dir / "imagenette2-320" / part / WNIDS[3]).iterdir():
        path.unlink()
    assert refusal(imagenette).startswith("Imagenette could not be read from")


@pytest.mark.parametrize("parts", [("train",), ("val",), ("train", "val")])
def test_an_imagenette_that_lacks_a_class_is_refused(imagenette, parts):
    for part in parts:
        shutil.rmtree(imagenette.data_dir / "imagenette2-320" / part / WNIDS[0])
    assert "Imagenette" in refusal(imagenette)


def test_an_imagenette_with_a_strange_folder_is_refused(imagenette):
    (imagenette.data_dir / "imagenette2-320" / "train" / ".ipynb_checkpoints").mkdir()
    assert "Imagenette" in refusal(imagenette)


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory):
    """ImageNet's thousand classes, with one photograph each."""
    folder = tmp_path_factory.mktemp("thousand")
    classes = [f"n{number:08}" for number in range(1000)]
    for part in ("train", "val"):
        write_photos(folder / "imagenet" / part, classes, 1)
    return folder


def test_imagenet_gives_224_pixel_float_batches(imagenet_folder):
    splits = load_splits(photo_settings("full", imagenet_folder))
    assert repr(splits) == "992 train, 8 validation, 1,000 test images in 1000 classes"
    assert splits.classes[:2] == ["tench", "goldfish"]
    check_photo_batches(splits)


def test_a_missing_imagenet_tells_where_to_get_it(tmp_path):
    message = refusal(photo_settings("full", tmp_path))
    assert message.startswith(f"ImageNet was not found in {tmp_path / 'imagenet'} (")
    assert "image-net.org" in message
    assert "\n" not in message


def test_an_imagenet_of_fewer_classes_is_refused(tmp_path):
    for part in ("train", "val"):
        write_photos(tmp_path / "imagenet" / part, WNIDS, 1)
    message = refusal(photo_settings("full", tmp_path))
    assert "has 10 training and 10 validation classes" in message
