import numpy as np
import pytest
from PIL import Image

from helpers.errors import InputError
from helpers.inference.calibration_images import load_calibration_images
from helpers.sparsity.onnx_inputs import OnnxInput
from helpers.training.data import IMAGENET_MEAN, IMAGENET_STD


def item(*dims):
    return [OnnxInput("images", np.dtype(np.float32), ("batch", *dims))]


def pictures(folder, count, size=(40, 60)):
    """Write pictures of one colour, which is their number, in two folders."""
    for number in range(count):
        path = folder / ("a" if number < count / 2 else "b") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 255)).save(path)
    return folder


def test_pictures_are_cut_and_normalised_as_for_inference(tmp_path):
    found = load_calibration_images(pictures(tmp_path, 10), item(3, 28, 28))["images"]
    assert found.shape == (10, 3, 28, 28)
    assert found.dtype == np.float32
    colours = np.array([[number, 0, 255] for number in range(10)]) / 255
    expected = (colours - IMAGENET_MEAN) / IMAGENET_STD
    assert found.std(axis=(2, 3)).max() < 1e-5
    np.testing.assert_allclose(found.mean(axis=(2, 3)), expected, atol=1e-5)


def test_the_centre_of_the_picture_is_kept(tmp_path):
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[20:60, 60:100] = 255
    Image.fromarray(pixels).save(tmp_path / "p.png")
    (found,) = load_calibration_images(tmp_path, item(3, 70, 70), mean=(0, 0, 0), std=(1, 1, 1))[
        "images"
    ]
    assert found.shape == (3, 70, 70)
    assert found[:, 17:53, 17:53].min() > 0.9
    assert found[:, :10].max() < 0.1


def test_few_of_many_pictures_are_of_all_folders(tmp_path):
    found = load_calibration_images(pictures(tmp_path, 40), item(3, 8, 8), count=5)["images"]
    reds = found[:, 0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    np.testing.assert_allclose(reds * 255, [0, 10, 20, 29, 39], atol=1e-3)


def test_grey_pictures_need_their_own_mean(tmp_path):
    pictures(tmp_path, 8)
    with pytest.raises(InputError, match="takes 1 channels: give --mean and --std"):
        load_calibration_images(tmp_path, item(1, 8, 8))
    found = load_calibration_images(tmp_path, item(1, 8, 8), mean=(0.5,), std=(0.5,))["images"]
    assert found.shape == (8, 1, 8, 8)


def test_arrays_are_taken_as_they_are(tmp_path):
    images = np.arange(48, dtype=np.float32).reshape(12, 1, 2, 2)
    np.savez(tmp_path / "data.npz", images=images, other=np.ones((12, 3)))
    found = load_calibration_images(tmp_path / "data.npz", item(1, 2, 2), count=6)
    assert found.keys() == {"images", "other"}
    np.testing.assert_array_equal(found["images"], images[[0, 2, 4, 7, 9, 11]])


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "x.jpg").write_text("no picture")
    (tmp_path / "x.npz").write_text("no arrays")
    cases = [
        ("none", item(3, 8, 8), "is neither a folder of pictures nor an .npz file"),
        ("empty", item(3, 8, 8), "has no pictures"),
        ("damaged", item(3, 8, 8), r"x\.jpg cannot be read as a picture"),
        ("x.npz", item(3, 8, 8), "cannot be read as inputs"),
        ("empty", item(3, "h", "w"), "leaves the size of its input .* open: --image-size"),
        ("empty", item(768), "not images"),
        ("empty", item(4, 8, 8), "of one or three channels"),
        ("empty", 2 * item(3, 8, 8), "Give its calibration data as an .npz file"),
    ]
    for name, inputs, complaint in cases:
        with pytest.raises(InputError, match=complaint):
            load_calibration_images(tmp_path / name, inputs)
