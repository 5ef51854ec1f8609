import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.errors import HelpersError, InputError, WriteError
from helpers.files import sha256
from helpers.layers import layer_weights
from helpers.sparsity import prune_2to4_, save_compressed
from helpers.sparsity.compressed import Checkpoint
from helpers.training import networks
from helpers.training.networks import (
    CheckpointError,
    checkpoint_model,
    create_model,
    create_on_meta,
    imagenette_indices,
    load_checkpoint,
    restrict_head_,
    save_checkpoint,
)
from helpers.tutorial.inputs import load_pretrained, pretrained_path
from helpers.tutorial.settings import Settings

NAME = "resnext14_8x1d"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(NAME, 10).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, NAME)
    return path


def refusal(action, *arguments):
    with pytest.raises(CheckpointError) as error:
        action(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


# The network of the quick preset.


def test_the_small_network_has_2608050_parameters(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_608_050


@pytest.mark.parametrize("classes", [10, 3])
def test_the_small_network_gives_one_logit_for_each_class(classes):
    logits = create_model(NAME, classes).eval()(torch.zeros(2, 1, 28, 28))
    assert logits.shape == (2, classes)


def test_the_small_network_has_14_weighted_layers_and_3_shortcuts(model):
    shortcuts = ["downsample" in name for name in layer_weights(model)]
    assert shortcuts.count(False) == 14
    assert shortcuts.count(True) == 3


def test_a_network_of_torchvision_is_made_by_name():
    with torch.device("meta"):
        assert create_model("resnet18", 7).fc.out_features == 7


def test_an_unknown_network_is_refused_by_name():
    with pytest.raises(HelpersError, match=r"^There is no classification network 'resnext15'"):
        create_model("resnext15", 10)


@pytest.mark.parametrize("name", [NAME, "resnet18", "regnet_x_400mf", "swin_t", "inception_v3"])
def test_a_model_on_meta_has_all_shapes_and_no_numbers(name):
    found, real = create_on_meta(name, 7), create_model(name, 7)
    assert all(value.is_meta for value in found.state_dict().values())
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (found, real)]
    assert shapes[0] == shapes[1]
    assert not next(create_model(name, 7).parameters()).is_meta, "the hooks are removed"


def test_the_hooks_are_removed_after_an_error_too():
    with pytest.raises(InputError):
        create_on_meta("resnext15", 10)
    assert not torch.nn.Linear(2, 2).weight.is_meta


# The checkpoint in the repository.


def test_the_shipped_checkpoint_is_small_and_as_its_card_says():
    path = pretrained_path(Settings.load("quick"))
    card = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 12e6
    assert sha256(path) == card["sha256"]
    assert card["test"]["total"] == 10_000
    assert 100 * card["test"]["correct"] / card["test"]["total"] >= 91.0


def test_the_shipped_checkpoint_is_loaded_ready_to_predict():
    model = load_pretrained(Settings.load("quick"))
    assert not model.training
    assert model(torch.zeros(1, 1, 28, 28)).isfinite().all()


@pytest.fixture
def copied(settings, tmp_path):
    source = pretrained_path(Settings.load("quick")).parent
    shutil.copytree(source, tmp_path / "data" / "pretrained")
    return replace(settings, data_dir=tmp_path / "data")


def test_a_damaged_pretrained_file_is_refused(copied):
    path = pretrained_path(copied)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = refusal(load_pretrained, copied)
    assert "resnext14_8x1d_fashionmnist.safetensors is damaged" in message
    assert "git checkout -- data/pretrained" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_pretrained_file_is_reported(copied, suffix):
    pretrained_path(copied).with_suffix(suffix).unlink()
    message = refusal(load_pretrained, copied)
    assert "is missing" in message
    assert "python -m helpers pretrain" in message


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_card_is_reported(copied, content):
    pretrained_path(copied).with_suffix(".json").write_text(content)
    message = refusal(load_pretrained, copied)
    assert "is damaged" in message
    assert "git checkout -- data/pretrained" in message


# Saving and loading.


def test_a_saved_network_is_loaded_unchanged(model, checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(images), model(images))


def test_a_save_that_fails_leaves_the_earlier_checkpoint(model, checkpoint, monkeypatch):
    def save_half(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = checkpoint.read_bytes()
    monkeypatch.setattr(networks, "save_file", save_half)
    with pytest.raises(WriteError, match="the disk is full"):
        save_checkpoint(model, checkpoint, NAME)
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_channels_last_network_is_saved_and_loaded(model, checkpoint):
    save_checkpoint(model.to(memory_format=torch.channels_last), checkpoint, NAME)
    assert torch.equal(load_checkpoint(checkpoint).conv1.weight, model.conv1.weight)


def test_the_number_of_classes_is_kept(tmp_path):
    save_checkpoint(create_model(NAME, 3), tmp_path / "three", NAME)
    assert load_checkpoint(tmp_path / "three").fc.out_features == 3


def test_a_checkpoint_of_another_architecture_is_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, "resnet18")
    message = refusal(load_checkpoint, path)
    assert message.startswith(f"{path} does not hold the weights of resnet18: ")


def test_a_checkpoint_of_an_unknown_network_is_refused(model, tmp_path):
    save_checkpoint(model, tmp_path / "model.safetensors", "resnext15")
    with pytest.raises(HelpersError, match="There is no classification network 'resnext15'"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_weight_of_another_shape_is_refused(checkpoint):
    state = load_file(checkpoint)
    state["fc.bias"] = torch.zeros(11)
    save_file(state, checkpoint, metadata={"model": NAME})
    assert "fc.bias" in refusal(load_checkpoint, checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"x" * 1000])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(load_checkpoint, path)
    assert message.startswith(f"{path} is not a readable safetensors file")


def test_a_truncated_checkpoint_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "is not a readable safetensors file" in refusal(load_checkpoint, checkpoint)


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert "is not a readable" in refusal(load_checkpoint, tmp_path / "model.safetensors")


def test_a_compressed_checkpoint_is_loaded_too(model, tmp_path):
    path = tmp_path / "compressed.safetensors"
    prune_2to4_(model)
    save_compressed(model, path, network=NAME)
    loaded = load_checkpoint(path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_a_compressed_checkpoint_that_names_no_network_is_refused(model, tmp_path):
    path = tmp_path / "compressed.safetensors"
    save_compressed(model, path)
    assert "does not name its network" in refusal(load_checkpoint, path)


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize(
    "name",
    ["mobilenet_v3_small", "vit_b_32", "squeezenet1_1", "densenet121", "vgg11", "swin_t",
     "efficientnet_b0", "convnext_tiny", "googlenet", "regnet_y_400mf", "maxvit_t"],
)  # fmt: skip
def test_the_classes_are_found_whatever_the_last_layer_is_called(monkeypatch, name, classes):
    state = create_on_meta(name, classes).state_dict()
    monkeypatch.setattr(networks, "read_checkpoint", lambda _: Checkpoint(state, name, False))
    found = checkpoint_model("net.safetensors").state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_a_network_without_a_layer_called_fc_is_loaded_unchanged(name, tmp_path):
    torch.manual_seed(0)
    saved = create_model(name, 3).eval()
    save_checkpoint(saved, tmp_path / "net", name)
    loaded = load_checkpoint(tmp_path / "net")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), saved(images))


def test_the_same_weights_give_the_same_bytes(model, checkpoint, tmp_path):
    for _ in range(3):
        save_checkpoint(model, tmp_path / "again", NAME)
        assert (tmp_path / "again").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_a_checkpoint_that_does_not_name_its_network_is_refused(checkpoint, header):
    save_file(load_file(checkpoint), checkpoint, metadata=header)
    message = refusal(load_checkpoint, checkpoint)
    assert message.startswith(f"{checkpoint} does not name its network in the header")


def test_a_checkpoint_that_does_not_tell_its_classes_is_refused(checkpoint):
    state = load_file(checkpoint)
    del state["fc.weight"]
    save_file(state, checkpoint, metadata={"model": NAME})
    assert "fc.weight is missing or of another shape" in refusal(load_checkpoint, checkpoint)


def test_the_model_of_a_checkpoint_is_found_by_its_header_or_by_name(model, checkpoint, tmp_path):
    for path, name in ((checkpoint, None), (checkpoint, NAME)):
        found = checkpoint_model(path, name)
        assert type(found) is type(model)
        assert found.fc.weight.is_meta
    save_file(model.state_dict(), tmp_path / "unnamed")
    assert checkpoint_model(tmp_path / "unnamed") is None
    assert type(checkpoint_model(tmp_path / "unnamed", NAME)) is type(model)
    assert "weights of vgg11: classifier.6.weight" in refusal(checkpoint_model, checkpoint, "vgg11")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_network_is_not_saved(model, tmp_path, value):
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0] = value
    message = refusal(save_checkpoint, model, tmp_path / "model.safetensors", NAME)
    assert message.startswith("layer1.0.conv1.weight of the model has NaN or infinite values")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_nan_is_not_loaded(checkpoint):
    state = load_file(checkpoint)
    state["bn1.running_var"][0] = torch.nan
    save_file(state, checkpoint, metadata={"model": NAME})
    message = refusal(load_checkpoint, checkpoint)
    assert message.startswith(f"bn1.running_var of {checkpoint} has NaN or infinite values")


# The real network.


def test_imagenette_is_ten_classes_of_imagenet():
    assert imagenette_indices() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def test_a_restricted_head_keeps_the_logits_of_its_classes(model):
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = model(images)
    restrict_head_(model, [7, 0, 3])
    assert model.fc.out_features == 3
    torch.testing.assert_close(model(images), before[:, [7, 0, 3]])


@pytest.fixture
def stand_in():
    """The imagenette preset with a smaller network, which is made in a moment."""
    return replace(Settings.load("imagenette"), model="resnet18")


def serve(monkeypatch, state):
    weights = networks.ResNeXt101_32X8D_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: state)


def test_imagenette_takes_its_ten_rows_of_the_pretrained_head(stand_in, monkeypatch):
    torch.manual_seed(1)
    state = create_model("resnet18", 1000).state_dict()
    serve(monkeypatch, state)
    model = load_pretrained(stand_in)
    assert torch.equal(model.fc.weight, state["fc.weight"][imagenette_indices()])
    assert torch.equal(model.fc.bias, state["fc.bias"][imagenette_indices()])
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_the_full_preset_keeps_all_thousand_classes(stand_in, monkeypatch):
    serve(monkeypatch, create_model("resnet18", 1000).state_dict())
    assert load_pretrained(replace(stand_in, dataset="ImageNet")).fc.out_features == 1000


def test_missing_pretrained_weights_without_a_network_are_told(
    stand_in, monkeypatch, tmp_path, no_network
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refusal(load_pretrained, stand_in)
    assert "resnext101_32x8d-8ba56ff5.pth could not be downloaded" in message
    assert "TORCH_HOME" in message
    assert str(tmp_path) in message


def zip_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        zip_file({"conv1.weight": torch.zeros(100)})[:300],
        b"",
        b"hello world" * 30,
        zip_file({"conv1.weight": torch.zeros(100)}),
    ],
    ids=["truncated", "empty", "no checkpoint", "another network"],
)
def test_damaged_pretrained_weights_are_told(stand_in, monkeypatch, tmp_path, no_network, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnext101_32x8d-8ba56ff5.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert "resnext101_32x8d-8ba56ff5.pth" in refusal(load_pretrained, stand_in)
