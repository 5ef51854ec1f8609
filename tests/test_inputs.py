"""What a preset starts from. Its weights are tested in test_networks.py and test_case_study.py."""

from dataclasses import replace

import pytest

from helpers.training.data import DataError
from helpers.tutorial.inputs import load_splits


@pytest.mark.parametrize("dataset", ["ImageNet", "Imagenette"])
def test_missing_images_name_the_variable_of_their_folder(settings, tmp_path, no_network, dataset):
    with pytest.raises(DataError, match="TUTORIAL_DATA sets the folder of the images") as raised:
        load_splits(replace(settings, dataset=dataset, data_dir=tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_test_batches_are_no_larger_than_an_engine_takes(settings):
    splits = load_splits(settings)
    assert max(settings.batch_sizes) == next(iter(splits.test))[0].shape[0]
