"""Putting a denoiser where it samples: its device and memory format."""

from __future__ import annotations

import torch

from pipestill.diffusion.denoiser import Denoiser


def place(denoiser: Denoiser, device: torch.device) -> Denoiser:
    """The denoiser on its device; on a GPU channels last, with TF32 products. Every rank computes the same way."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        denoiser.to(memory_format=torch.channels_last)
    return denoiser.to(device)
