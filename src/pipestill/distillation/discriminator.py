"""The discriminator: a small head on the bottleneck of an encoder that already knows noisy images."""

from __future__ import annotations

from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoiser
from pipestill.networks.unet import bottleneck_shape, encoder_view


class Head(nn.Sequential):
    """Bottleneck [N, C, S, S] to one logit [N]: halved until 4×4 or less, then to 1×1 (DMD2's head, any size).

    For ImageNet-64 (768×8×8): conv 4×4 stride 2, GroupNorm, SiLU; conv 4×4, GroupNorm, SiLU; conv 1×1.
    """

    def __init__(self, channels: int, side: int) -> None:
        # at the 1×1 end a group is a few channels of one sample; too few would normalise the signal away
        groups = next((count for count in (32, 16, 8, 4, 2) if channels % count == 0 and channels >= 16 * count), 1)
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, side), nn.GroupNorm(groups, channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, 1, 1), nn.Flatten(0)]
        super().__init__(*layers)


class FakeScore(nn.Module):
    """The fake score with the discriminator's head, one module so that DDP sees one forward.

    `features` names whose encoder the head reads: the fake score's own, which it trains, or the frozen teacher's.
    """

    _features_from: Denoiser
    _encoder: nn.Module

    def __init__(self, denoiser: Denoiser, head: Head | None, features_from: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head = head
        # views share their network's parameters and stay off the module tree
        object.__setattr__(self, "_features_from", features_from)
        object.__setattr__(self, "_encoder", encoder_view(features_from.network))

    def logits(self, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The discriminator's logits [N] for noised images. Raises ValueError where there is no head."""
        if self.head is None:
            raise ValueError("this fake score was built without a discriminator")
        features = self._features_from.run_network(self._encoder, noisy, sigma, condition)
        out: Tensor = self.head(features)
        return out

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        judged: tuple[Tensor, Tensor, Condition] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Denoised images and, where `judged` gives other noised images, their logits."""
        denoised = self.denoiser(noisy, sigma, condition)
        return denoised, None if judged is None else self.logits(*judged)


def build_head(denoiser: Denoiser) -> Head:
    """A head that fits the bottleneck of the denoiser's network."""
    return Head(*bottleneck_shape(denoiser.network))
