import numpy as np
import onnx
import pytest
import torch
from int8_cases import images, residual_file
from onnx import helper, numpy_helper

from helpers.errors import InputError
from helpers.inference.activation_ranges import MIN_IMAGES, activation_ranges, calibration_feeds
from helpers.inference.onnx_session import open_session
from helpers.sparsity.onnx_inputs import OnnxInput


def activation(path, name, feeds):
    """Return one activation of a file on some images."""
    model = onnx.load(path)
    model.graph.output.append(helper.make_empty_tensor_value_info(name))
    onnx.save(model, path.with_name("shown.onnx"))
    return open_session(path.with_name("shown.onnx")).run([name], {"images": feeds})[0]


@pytest.mark.parametrize("name", ["images", "sr", "d", "m", "j", "jr", "v", "logits"])
def test_min_max_is_that_of_each_activation_over_all_batches(tmp_path, name):
    path, data = residual_file(tmp_path / "net.onnx"), images(20)
    ranges = activation_ranges(path, data, batch_size=3)
    expected = data if name == "images" else activation(path, name, data)
    low, high = ranges.values[name]
    assert low == pytest.approx(expected.min(), rel=1e-5)
    assert high == pytest.approx(expected.max(), rel=1e-5)
    assert (ranges.images, ranges.method) == (20, "min-max")


def test_a_percentile_leaves_outliers_out(tmp_path):
    path, data = residual_file(tmp_path / "net.onnx"), images(64)
    data[0, 0, 0, 0] = 1000
    widest = activation_ranges(path, data).values["images"]
    narrow = activation_ranges(path, data, percentile=99.9, batch_size=16).values["images"]
    assert widest[1] == 1000
    inside = np.mean((data >= narrow[0]) & (data <= narrow[1]))
    assert 0.99 < inside < 1
    assert narrow[1] < 10


def test_an_fp16_file_has_the_ranges_of_its_twin(tmp_path):
    full = activation_ranges(residual_file(tmp_path / "full.onnx"), images())
    half = activation_ranges(residual_file(tmp_path / "half.onnx", half=True), images())
    assert set(full.values) == set(half.values)
    for name, ends in full.values.items():
        assert half.values[name] == pytest.approx(ends, rel=2e-2, abs=2e-2)


def test_tensors_and_arrays_by_name_are_images_too(tmp_path):
    path = residual_file(tmp_path / "net.onnx")
    expected = activation_ranges(path, images()).values
    assert activation_ranges(path, torch.from_numpy(images())).values == expected
    assert activation_ranges(path, {"images": images().astype(np.float64)}).values == expected


def test_a_fixed_batch_is_filled_up_with_the_first_images(tmp_path):
    item = OnnxInput("images", np.dtype(np.float32), (8, 4, 6, 6))
    feeds = calibration_feeds([item], tmp_path / "net.onnx", images(10))
    assert [len(each["images"]) for each in feeds] == [8, 8]
    assert np.array_equal(feeds[1]["images"], images(10)[[8, 9, 0, 1, 2, 3, 4, 5]])


def nan_image():
    data = images()
    data[3, 1, 2, 2] = np.nan
    return data


BAD = {
    "none": (images(0), "There are 0 calibration images, too few"),
    "one": (images(1), "There is 1 calibration image, too few"),
    "few": (images(MIN_IMAGES - 1), "too few to know the ranges"),
    "nan": (nan_image(), "1 of 32 calibration images have numbers that are not finite"),
    "infinite": (np.full((9, 4, 6, 6), np.inf, np.float32), "9 of 9 calibration images"),
    "shape": (np.zeros((32, 3, 224, 224), np.float32), "shape 32x3x224x224, which does not fit"),
    "rank": (np.zeros((32, 4), np.float32), "shape 32x4, which does not fit"),
    "name": ({"input_1": images()}, "have the inputs input_1, and"),
    "no name": ({}, "have the inputs none, and"),
    "pixels": (np.zeros((32, 4, 6, 6), np.uint8), "are uint8, and"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibration_data_are_one_sentence(tmp_path, case):
    data, complaint = BAD[case]
    with pytest.raises(InputError, match=complaint):
        activation_ranges(residual_file(tmp_path / "net.onnx"), data)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("percentile", [0, 50, 100.1, -1])
def test_a_percentile_is_one_of_the_upper_half(tmp_path, percentile):
    with pytest.raises(InputError, match="not above 50 and at most 100"):
        activation_ranges(residual_file(tmp_path / "net.onnx"), images(), percentile)


def test_activations_that_overflow_are_refused(tmp_path):
    path = residual_file(tmp_path / "net.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "fc.w":
            huge = np.full((10, 16), 3e38, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(huge, "fc.w"))
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"The activation logits of .* is not finite"):
        activation_ranges(path, images())


def test_a_file_that_onnxruntime_cannot_run_is_refused(tmp_path):
    unknown = helper.make_node("Mystery", ["logits"], ["out"], "mystery", domain="acme")
    path = residual_file(tmp_path / "net.onnx", more=(unknown,))
    with pytest.raises(InputError, match=r"cannot be calibrated: ONNX Runtime does not run it"):
        activation_ranges(path, images())
