"""EDM's ADM network in Diffusers against an independent forward in EDM's own names, and the ways in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from edm_files import TINY, denoised, random_tensors, write_edm_pickle, write_foreign_pickle
from pipestill.config import EdmParams
from pipestill.diffusion.conditions import ClassCondition, NoCondition
from pipestill.errors import InputError
from pipestill.networks import adm, checkpoints
from pipestill.networks.model import wrap
from pipestill.networks.unet import EdmUNet2DModel

LAYOUTS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "one level, no attention in it": TINY | {"channel_mult": [1], "model_channels": 64, "attn_resolutions": []},
    "groups that differ by level": TINY | {"channel_mult": [1, 2, 4], "attn_resolutions": [4, 2]},
    "three blocks, as ImageNet-64": TINY
    | {"num_blocks": 3, "channel_mult": [1, 2, 3], "model_channels": 64, "attn_resolutions": [4, 2]},
    "attention everywhere": TINY | {"model_channels": 64, "attn_resolutions": [8, 4]},
    "wide enough for 32 groups": TINY | {"model_channels": 128, "attn_resolutions": [8]},
    "another embedding": TINY | {"channel_mult_emb": 2},
    "no classes": TINY | {"label_dim": 0},
    "augmented": TINY | {"augment_dim": 9},
    "grey": TINY | {"in_channels": 1, "out_channels": 1},
}


def converted(layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EdmUNet2DModel:
    found = adm.infer(tensors, "here")
    unet = adm.build(found)
    unet.load_state_dict(adm.to_diffusers(tensors, found, "here"))
    return unet.eval()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_denoiser_is_edms_over_all_noise_levels(kind: str) -> None:
    """Relative to the largest output, fp32 against the same formulas in float64; the schedule's ends included."""
    layout = LAYOUTS[kind]
    tensors = random_tensors(layout)
    denoiser = wrap(converted(layout, tensors), EdmParams())
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(1)
    shape = (1, layout["in_channels"], layout["img_resolution"], layout["img_resolution"])
    classes = layout["label_dim"]
    for sigma in (0.002, 0.05, 0.5, 5.0, 80.0):
        x = torch.randn(shape, generator=generator) * (sigma**2 + 0.25) ** 0.5
        label = torch.tensor([int(torch.randint(classes, (1,), generator=generator))]) if classes else None
        one_hot = torch.nn.functional.one_hot(label, classes).double() if label is not None else None
        condition = ClassCondition(label, None) if label is not None else NoCondition(1)
        with torch.no_grad():
            ours = denoiser(x, torch.tensor([sigma]), condition)
        theirs = denoised(exact, layout, x.double(), torch.tensor([sigma], dtype=torch.float64), one_hot)
        # what the network adds to c_skip·x, so that small sigmas prove as much as large ones
        skipped = 0.25 / (sigma**2 + 0.25) * x
        scale = (theirs - skipped).abs().max()
        assert (ours - theirs).abs().max() <= 1e-5 * scale + 1e-6 * theirs.abs().max(), sigma


def test_no_class_is_edms_row_of_zeros() -> None:
    tensors = random_tensors(TINY)
    denoiser = wrap(converted(TINY, tensors), EdmParams())
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 10.0])
    with torch.no_grad():
        ours = denoiser(x, sigma, ClassCondition(torch.tensor([4, 4]), 4))
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    theirs = denoised(exact, TINY, x.double(), sigma.double(), torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_there_and_back_gives_the_same_tensors(kind: str) -> None:
    layout = LAYOUTS[kind]
    tensors = random_tensors(layout)
    found = adm.infer(tensors, "here")
    stated = {key: value for key, value in layout.items() if key not in ("augment_dim", "dropout")}
    assert adm.describe(found) == stated
    back = adm.to_edm(adm.to_diffusers(tensors, found, "here"), found)
    assert back.keys() == {name for name in tensors if not name.startswith("map_augment")}
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    assert adm.layout_of(adm.build(found), "here") == found


def test_a_saved_network_loads_as_its_own_class_alone(tmp_path: Path) -> None:
    unet = converted(TINY, random_tensors(TINY))
    unet.save_pretrained(tmp_path / "unet")
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "EdmUNet2DModel"
    again = EdmUNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -0.3]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(again(x, noise, labels).sample, unet(x, noise, labels).sample)
    with pytest.raises((TypeError, ValueError)):  # another number of groups would load and be wrong
        UNet2DModel.from_pretrained(tmp_path / "unet")


# --- files --------------------------------------------------------------------------------------------------------


def test_a_pickle_gives_layout_tensors_and_what_it_says_beside_them(tmp_path: Path) -> None:
    layout = TINY | {"augment_dim": 9}
    tensors = random_tensors(layout)
    found = checkpoints.find(write_edm_pickle(tmp_path / "edm.pkl", layout, tensors), "ema")
    assert adm.describe(found.layout)["attn_resolutions"] == [4]
    assert (found.sigma_data, found.unconditional_branch, found.augmented) == (0.5, False, True)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_checkpoint_of_dmd2_names_its_networks(tmp_path: Path, suffix: str) -> None:
    """`pytorch_model.bin` of a generator, and of a guidance model: fake and real score, and a classifier's head."""
    networks = {
        "feedforward_model": random_tensors(TINY, 1),
        "guidance_model.fake_unet": random_tensors(TINY, 2),
        "guidance_model.real_unet": random_tensors(TINY, 3),
    }
    body = {f"{name}.model.{key}": tensor for name, found in networks.items() for key, tensor in found.items()}
    body["guidance_model.cls_pred_branch.0.weight"] = torch.zeros(2, 2)
    path = tmp_path / f"pytorch_model{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(body, path)
    else:
        torch.save(body, path)
    for name, tensors in networks.items():
        found = checkpoints.find(path, name)
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in tensors.items())
        assert found.unconditional_branch is None
    with pytest.raises(
        InputError, match=r"no network 'ema' \(there are: feedforward_model, guidance_model\.fake_unet, "
    ):
        checkpoints.find(path, "ema")


def test_a_plain_state_dict_is_called_model(tmp_path: Path) -> None:
    torch.save(random_tensors(TINY), tmp_path / "plain.pt")
    assert checkpoints.find(tmp_path / "plain.pt", "model").layout.classes == 4


class Ran:
    def __reduce__(self) -> Any:
        return open, ("ran", "w")


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Ran()}, tmp_path / "hostile.bin")
    with pytest.raises(InputError, match=r"no checkpoint of plain tensors \(.*io\.open\); nothing in it was run"):
        checkpoints.find(tmp_path / "hostile.bin", "model")
    assert not (tmp_path / "ran").exists()


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without(t, "enc.8x8_block0.conv0.bias"), "lacks enc.8x8_block0.conv0.bias"),
        (lambda t: without(t, "enc.8x8_conv.weight"), "no ADM network"),
        (lambda t: t | {"enc.8x8_block0.extra": torch.zeros(1)}, "an ADM network does not: enc.8x8_block0.extra"),
        (lambda t: t | {"map_layer0.weight": torch.zeros(3, 3)}, "map_layer0.weight has the shape [3, 3]"),
        (lambda t: t | {"enc.4x4_down.conv0.resample_filter": torch.full((1, 1, 2, 2), 0.3)}, "is not the 2×2 box"),
        (lambda t: {"unet.weight": torch.zeros(1)}, "no ADM network"),
        (lambda t: t | {"enc.8x8_block2000.conv1.weight": torch.zeros(1)}, "not numbered one after the other"),
        (lambda t: t | {"enc.8x8_conv.weight": torch.zeros(0, 1, 3, 3)}, "convolution has the shape [0, 1, 3, 3]"),
        (lambda t: t | {"out_conv.bias": torch.zeros(3, dtype=torch.complex64)}, "out_conv.bias holds torch.complex64"),
        (lambda t: t | {"out_conv.bias": torch.tensor([0.0, float("nan"), 0.0])}, "numbers that are not finite"),
        (lambda t: t | {"map_layer1.weight": torch.zeros(1).expand(3, 128)}, "which does not fit"),
    ],
)  # fmt: skip
def test_what_is_no_adm_network_is_named(change: Any, says: str) -> None:
    tensors = change(random_tensors(TINY))
    with pytest.raises(InputError) as error:
        adm.to_diffusers(tensors, adm.infer(tensors, "here"), "here")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (TINY | {"channel_mult": [2, 2]}, "first level has 2 times the width"),
        (TINY | {"attn_resolutions": [8, 4]}, "attention over 32 channels, a multiple of 64 is needed"),
    ],
)
def test_a_layout_that_diffusers_does_not_have_is_refused(layout: dict[str, Any], says: str) -> None:
    if layout["channel_mult"] == [2, 2]:
        tensors = random_tensors(TINY)
        tensors["enc.8x8_conv.weight"] = tensors["enc.8x8_conv.weight"][:16]
        with pytest.raises(InputError, match=says):
            adm.infer(tensors, "here")
        return
    tensors = random_tensors(TINY) | {"enc.8x8_block0.qkv.weight": torch.zeros(96, 32, 1, 1)}
    with pytest.raises(InputError, match=says):
        adm.infer(tensors, "here")


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"num_blocks": 2}, "says num_blocks=2, its tensors say 1"),
        ({"channel_mult": [1, 3]}, r"says channel_mult=\[1, 3\], its tensors say \[1, 2\]"),
        ({"legacy": True}, "was made with legacy=True, which is not understood"),
        ({"label_dropout": "often"}, "was made with label_dropout='often', a number was expected"),
    ],
)
def test_a_pickle_whose_words_and_tensors_differ_is_refused(tmp_path: Path, stated: dict[str, Any], says: str) -> None:
    path = write_edm_pickle(tmp_path / "edm.pkl", TINY | stated, random_tensors(TINY))
    with pytest.raises(InputError, match=says):
        checkpoints.find(path, "ema")


SUPPORTED = "pipestill converts only EDM's ADM network, DhariwalUNet in EDMPrecond (edm-imagenet-64x64-cond-adm.pkl)"


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("EDM2", "an EDM2 network (Precond)"),
        ("SongUNet in EDMPrecond", "the DDPM++ or NCSN++ network (SongUNet)"),
        ("SongUNet in VPPrecond", "a network with VP preconditioning (VPPrecond)"),
        ("SongUNet in VEPrecond", "a network with VE preconditioning (VEPrecond)"),
        ("DhariwalUNet in iDDPMPrecond", "a network with iDDPM preconditioning (iDDPMPrecond)"),
        ("Transformer in EDMPrecond", "a Transformer"),
        ("UNet in EDMPrecond", "EDM2's network (UNet)"),
    ],
)
def test_a_pickle_of_another_architecture_is_refused_by_its_name(tmp_path: Path, architecture: str, says: str) -> None:
    path = write_foreign_pickle(tmp_path / "other.pkl", architecture)
    with pytest.raises(InputError) as error:
        checkpoints.find(path, "ema")
    assert str(error.value) == f"{path}, network ema is {says}: {SUPPORTED}"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("map_layer0.weight", "enc.32x32_conv.weight", "dec.32x32_aux_conv.weight"), "DDPM++ or NCSN++ network"),
        (("model.map_layer0.weight", "model.dec.8x8_aux_conv.weight"), "DDPM++ or NCSN++ network"),
        (("unet.emb_noise.weight", "unet.enc.64x64_conv.weight", "logvar_linear.weight"), "EDM2's network"),
        (("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"), "OpenAI's guided-diffusion or a latent"),
        (("model.diffusion_model.input_blocks.0.0.weight",), "OpenAI's guided-diffusion or a latent"),
        (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "a Diffusers network"),
        (("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"), "a diffusion transformer (DiT)"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_its_name(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "other.pt"
    torch.save({name: torch.zeros(4, 4) for name in names}, path)
    with pytest.raises(InputError) as error:
        checkpoints.find(path, "model")
    assert says in str(error.value)
    assert str(error.value).endswith(SUPPORTED)


def test_a_converted_network_with_positional_arguments_is_refused(tmp_path: Path) -> None:
    path = write_foreign_pickle(tmp_path / "odd.pkl", "DhariwalUNet in EDMPrecond", 32)
    with pytest.raises(InputError, match="DhariwalUNet was constructed with positional arguments"):
        checkpoints.find(path, "ema")


def test_a_network_that_is_not_in_the_pickle_is_named(tmp_path: Path) -> None:
    path = write_edm_pickle(tmp_path / "edm.pkl", TINY, random_tensors(TINY))
    with pytest.raises(InputError, match=r"has no network 'net' \(there are: ema\)"):
        checkpoints.find(path, "net")


def test_checkpoints_of_anything_but_plain_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"x": torch.zeros(1).expand(10**9)}, path)
    with pytest.raises(InputError, match="x shows more numbers than it has"):
        checkpoints.read_tensors(path)
    torch.save({"x": torch.eye(3).to_sparse()}, path)
    with pytest.raises(InputError, match="x is no plain tensor"):
        checkpoints.read_tensors(path)
    torch.save({f"{name}map_layer0.weight": torch.zeros(1) for name in ("model.", "model.model.")}, path)
    with pytest.raises(InputError, match="two networks of one name"):
        checkpoints.find(path, "model")
    for share in (0.2, 0.9):
        torch.save(random_tensors(TINY), path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(InputError, match="no checkpoint of plain tensors"):
            checkpoints.read_tensors(path)
