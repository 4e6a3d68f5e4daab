"""The EDM family as denoisers: preconditioned networks, class labels, files.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364. A network lives in a folder of ours, `config.json` (class and arguments under
their published names) and `model.safetensors` (tensors under theirs), or in an NVIDIA pickle.

Shapes: B batch, C channels, H = W = img_resolution, L classes. x [B, C, H, W], sigma [B].
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from backends.edm_networks import UNet, build_unet
from backends.edm_pickle import Network, read_network
from backends.edm_precond import PRECONDS, SHORT, Precond, rows
from solvers.field import Condition
from src.files import write_atomically, write_json

__all__ = ["EDM", "build_edm", "class_condition", "load_edm", "save_edm"]

FORMAT = 1
CPU_LAYOUT = torch.channels_last
"""Convolutions in float32 are about 1.5 times as fast in it on a CPU."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FREQS = "model.map_noise.freqs"
OUTER = ("img_resolution", "img_channels", "label_dim", "use_fp16", "model_type")


class EDM(nn.Module):
    """A preconditioned network: the denoiser, with its raw network under `model.`.

    `class_name` and `arguments` are the published ones, enough to build it again.
    """

    def __init__(
        self, model: UNet, precond: Precond, class_name: str, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.precond = precond
        self.class_name = class_name
        self.arguments = arguments
        self.img_resolution: int = arguments["img_resolution"]
        self.img_channels: int = arguments["img_channels"]
        self.label_dim: int = arguments["label_dim"]
        self.sigma_min, self.sigma_max = precond.levels

    @property
    def dtype(self) -> torch.dtype:
        """What the convolutions run in."""
        return next(self.model.enc.parameters()).dtype

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Tensor:
        """x [B, C, H, W] at sigma [B] or [] -> x0 [B, C, H, W] in the dtype of x.

        `cond.given["class_labels"]` is [B, L], one-hot, or zeros for "no class"; so is no cond.
        Raises ValueError where channels or labels have another size than the network's.
        """
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            wanted = f"[B, {self.img_channels}, H, W]"
            raise ValueError(f"x is {list(x.shape)}, but the network takes {wanted}")
        state = x if x.dtype == torch.float64 else x.float()
        scaling = self.precond(sigma.to(state).expand(len(x)))
        out = self.raw(rows(scaling.into) * state, scaling.noise, self._labels(cond, len(x)))
        return (rows(scaling.skip) * state + rows(scaling.out) * out.to(state)).to(x.dtype)

    def raw(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The bare network F in its own dtype: x [B, C, H, W], c_noise [B], labels [B, L]."""
        dtype = self.dtype
        return self.model(x.to(dtype), noise.to(_at_least_float(dtype)), labels)

    def cast(self, dtype: torch.dtype) -> "EDM":
        """Run the network in `dtype`, in place.

        The noise embedding keeps its own precision, which matters more than its time: its
        frequencies stay as they are, its layers are float32 at least.
        """
        for name, module in self.model.named_modules():
            if name == "map_noise" or next(module.children(), None) is not None:
                continue
            embeds = name.startswith("map_") or name.endswith(".affine")
            module.to(_at_least_float(dtype) if embeds else dtype)
        return self

    def _labels(self, cond: Condition | None, b: int) -> Tensor | None:
        labels = None if cond is None else cond.given.get("class_labels")
        if labels is not None and labels.shape != (b, self.label_dim):
            raise ValueError(
                f"class_labels are {list(labels.shape)}, the network takes [{b}, {self.label_dim}]"
            )
        return labels


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def class_condition(
    classes: Tensor | None, label_dim: int, *, device: torch.device | str = "cpu"
) -> Condition | None:
    """Classes [B] in 0 .. label_dim-1 -> their one-hot rows, with zeros as "no class".

    None stays None. Raises ValueError on a class out of range, or any class where the network
    takes none.
    """
    if classes is None:
        return None
    if not label_dim:
        raise ValueError("the network takes no classes; leave the class out")
    bad = classes[(classes < 0) | (classes >= label_dim)]
    if len(bad):
        raise ValueError(f"class {int(bad[0])} is out of range; choose 0 to {label_dim - 1}")
    labels = nn.functional.one_hot(classes.long(), label_dim).float().to(device)
    return Condition({"class_labels": labels}, {"class_labels": torch.zeros_like(labels)})


def build_edm(precond: str, arguments: Mapping[str, Any]) -> EDM:
    """A preconditioned network with zero weights, from its published arguments.

    `precond` is "edm", "vp", "ve" or the published class name. `arguments` are img_resolution,
    img_channels, label_dim, model_type, those of the preconditioning and those of the network.
    Raises ValueError on names and values that make no network.
    """
    class_name = SHORT.get(precond, precond)
    if class_name not in PRECONDS:
        raise ValueError(f"unknown preconditioning {precond!r}; known: {', '.join(PRECONDS)}")
    missing = [key for key in OUTER[:2] if key not in arguments]
    if missing:
        raise ValueError(f"{class_name} needs {', '.join(missing)}")
    own = {field.name for field in fields(PRECONDS[class_name])}
    scalars = {k: v for k, v in arguments.items() if k in own}
    for name, value in scalars.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{name} must be a number from 0, not {value!r}")
    arguments = {
        "label_dim": 0,
        "model_type": "DhariwalUNet" if class_name == "EDMPrecond" else "SongUNet",
        **{k: v for k, v in arguments.items() if k not in own or isfinite(v)},
    }
    inner = {k: v for k, v in arguments.items() if k not in own and k not in OUTER}
    inner |= {k: arguments[k] for k in ("img_resolution", "label_dim")}
    inner |= dict.fromkeys(("in_channels", "out_channels"), arguments["img_channels"])
    if not isinstance(arguments.get("use_fp16", False), bool):
        raise ValueError(f"use_fp16 must be true or false, not {arguments['use_fp16']!r}")
    model = build_unet(arguments["model_type"], inner)
    network = EDM(model, PRECONDS[class_name](**scalars), class_name, arguments).eval()
    return network.to(memory_format=CPU_LAYOUT)


def load_edm(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EDM:
    """A network from a folder of ours or from an NVIDIA `.pkl`, run in `dtype`, without gradients.

    The file's `use_fp16` is kept but not obeyed: `dtype` alone decides. Raises
    ValueError, in one line, on a path that is neither and on a broken or foreign file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no network at {path}; give a folder with {CONFIG} or a .pkl file")
    read = read_network(path) if path.is_file() else _read_folder(path)
    try:
        with torch.device("meta"):
            network = build_edm(read.class_name, read.arguments)
        _fill(network, read.state)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    on_cpu = torch.device(device).type == "cpu"
    layout = CPU_LAYOUT if on_cpu else torch.contiguous_format
    return network.cast(dtype).to(device).to(memory_format=layout).requires_grad_(False)


def _read_folder(folder: Path) -> Network:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        state = load_safetensors((folder / WEIGHTS).read_bytes())
    except OSError as e:
        raise ValueError(
            f"{folder}: cannot read {Path(str(e.filename)).name}: {e.strerror}"
        ) from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{folder / CONFIG}: not JSON: {_line(e)}") from e
    except SafetensorError as e:
        raise ValueError(f"{folder / WEIGHTS}: not a safetensors file: {_line(e)}") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: not a network of format {FORMAT}")
    class_name, arguments = config.get("class"), config.get("arguments")
    if not isinstance(class_name, str) or not isinstance(arguments, dict):
        raise ValueError(f"{folder / CONFIG}: needs a class and its arguments")
    return Network(class_name, arguments, state)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fill(network: EDM, state: Mapping[str, Tensor]) -> None:
    """Give the network its tensors; ValueError where they are not exactly its own."""
    own = network.state_dict()
    for what, names in (("lacks", own.keys() - state), ("has a foreign", state.keys() - own)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the file {what} {min(names)}{more}, for a {network.class_name}")
    for name, value in state.items():
        if value.shape != own[name].shape:
            wanted = list(own[name].shape)
            raise ValueError(f"{name} is {list(value.shape)} in the file, must be {wanted}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} holds values that are no finite floats")
    network.load_state_dict(dict(state), assign=True)


def save_edm(
    folder: Path | str,
    network: EDM,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    The tensors keep their dtypes unless one is given; Fourier frequencies, where rounding would
    turn phases, keep theirs anyway. `about` is for readers.
    """
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "backend": "edm",
        "class": network.class_name,
        "arguments": network.arguments,
        "about": dict(about or {}),
    }
    state = {
        k: v.detach().to("cpu", v.dtype if k == FREQS else dtype).contiguous()
        for k, v in network.state_dict().items()
    }
    with write_atomically(folder / WEIGHTS) as part:
        part.write_bytes(save_safetensors(state))
    write_json(folder / CONFIG, config)


@click.group()
def main() -> None:
    """Networks of the EDM family."""


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def convert(source: Path, target: Path) -> None:
    """Turn SOURCE, an NVIDIA .pkl, into TARGET, a folder of ours.

    Example: python -m backends.edm convert edm-cifar10-32x32-cond-vp.pkl models/cifar10
    """
    if target.suffix == ".pkl":
        raise click.ClickException(f"{target}: NVIDIA's pickles are read alone: name a folder")
    try:
        network = load_edm(source)
        save_edm(target, network)
    except (ValueError, OSError) as e:
        raise click.ClickException(_line(e)) from e
    count = sum(p.numel() for p in network.parameters())
    click.echo(f"{target}: {network.class_name}, {count:,} parameters")


if __name__ == "__main__":
    main()
