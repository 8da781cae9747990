"""The architectures that other projects publish weights of, recognised by class or tensor names.

Only names them, so that a refusal says what a file holds. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SUPPORTED = "pipestill converts only EDM's ADM network, DhariwalUNet in EDMPrecond (edm-imagenet-64x64-cond-adm.pkl)"

CLASSES = {
    "SongUNet": "the DDPM++ or NCSN++ network (SongUNet)",
    "VPPrecond": "a network with VP preconditioning (VPPrecond)",
    "VEPrecond": "a network with VE preconditioning (VEPrecond)",
    "iDDPMPrecond": "a network with iDDPM preconditioning (iDDPMPrecond)",
    "Precond": "an EDM2 network (Precond)",
    "UNet": "EDM2's network (UNet)",
    "Block": "a part of EDM2's network (Block)",
    "MPConv": "a part of EDM2's network (MPConv)",
}
TENSORS = {  # each name occurs in this architecture and in none of the others
    r"(.*\.)?dec\.\d+x\d+_aux_conv\.weight": CLASSES["SongUNet"],
    r"(.*\.)?emb_noise\.weight": "EDM2's network (UNet in Precond)",
    r"(.*\.)?input_blocks\.0\.0\.weight": "OpenAI's guided-diffusion or a latent diffusion network",
    r"(.*\.)?down_blocks\.0\.resnets\.0\.conv1\.weight": "a Diffusers network",
    r"(.*\.)?blocks\.0\.adaLN_modulation\.1\.weight": "a diffusion transformer (DiT)",
}


def of_class(name: str) -> str:
    """What a pickled class is, in a sentence's words."""
    return CLASSES.get(name, f"a {name}")


def of_tensors(names: Iterable[str]) -> str | None:
    """The architecture that the tensor names of a checkpoint point to; None if they point to none of these."""
    names = list(names)
    for pattern, architecture in TENSORS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return architecture
    return None
