"""The EDM family: preconditioned networks as denoisers of pixels, class labels, files.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364. A network lives in a folder of ours, `config.json` (class and arguments under
their published names) and `model.safetensors` (tensors under theirs), or in an NVIDIA pickle.

Shapes: B batch, C channels, H = W = img_resolution, L classes. x [B, C, H, W], sigma [B].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import exp, inf, isfinite, sqrt
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backends.base import Backend, Prompt, classifier_free, pixels
from backends.edm_networks import UNet, build_unet
from solvers.field import Condition
from solvers.process import VE
from solvers.schedules import NoiseLevels
from src.files import from_json, write_atomically, write_json
from src.inert import Inert, shown
from src.options import OneLineGroup
from src.pickles import module_tensors, read_pickle
from src.seeds import randint

__all__ = ["EDMNetwork", "build_edm", "class_condition", "load_edm", "save_edm"]

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FREQS = "model.map_noise.freqs"
OUTER = ("img_resolution", "img_channels", "label_dim", "use_fp16", "model_type")
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""The range that EDM samples in (table 1), where the network allows it."""


# --- preconditioning: table 1, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) ----------------


class Scaling(NamedTuple):
    """The four factors of table 1 at B noise levels, each [B]."""

    skip: Tensor | float
    out: Tensor
    into: Tensor | float
    noise: Tensor


@dataclass(frozen=True)
class EDMPrecond:
    """Unit variance in and out of the network (table 1, "Ours")."""

    sigma_min: float = 0.0
    sigma_max: float = inf
    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Scaling:
        total = sigma.square() + self.sigma_data**2
        root = total.rsqrt()
        out = sigma * self.sigma_data * root
        return Scaling(self.sigma_data**2 / total, out, root, sigma.log() / 4)


@dataclass(frozen=True)
class VPPrecond:
    """The variance-preserving SDE with linear beta (table 1, "VP")."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    def sigma(self, t: float) -> float:
        """The level at a time in [0, 1]."""
        return sqrt(exp(self.beta_d * t**2 / 2 + self.beta_min * t) - 1)

    @property
    def sigma_min(self) -> float:
        """The level at epsilon_t, the least time."""
        return self.sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        """The level at time 1."""
        return self.sigma(1.0)

    def __call__(self, sigma: Tensor) -> Scaling:
        variance = sigma.square()
        bend = (self.beta_min**2 + 2 * self.beta_d * variance.log1p()).sqrt()
        noise = (self.M - 1) * (bend - self.beta_min) / self.beta_d
        return Scaling(1.0, -sigma, (variance + 1).rsqrt(), noise)


@dataclass(frozen=True)
class VEPrecond:
    """The variance-exploding SDE (table 1, "VE")."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __call__(self, sigma: Tensor) -> Scaling:
        return Scaling(1.0, sigma, 1.0, (sigma / 2).log())


Precond: TypeAlias = EDMPrecond | VPPrecond | VEPrecond
PRECONDS: dict[str, type[Precond]] = {c.__name__: c for c in (EDMPrecond, VPPrecond, VEPrecond)}
SHORT = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def rows(factor: Tensor | float) -> Tensor | float:
    """A factor [B] made to multiply images [B, C, H, W]."""
    return factor[:, None, None, None] if isinstance(factor, Tensor) else factor


# --- the denoiser -------------------------------------------------------------------------------


class EDMNetwork(nn.Module):
    """A preconditioned network: the denoiser, with its raw network under `model.`.

    `class_name` and `arguments` are the published ones, enough to build it again.
    """

    def __init__(
        self, model: UNet, precond: Precond, class_name: str, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.precond = model, precond
        self.class_name, self.arguments = class_name, arguments
        self.img_resolution: int = arguments["img_resolution"]
        self.img_channels: int = arguments["img_channels"]
        self.label_dim: int = arguments["label_dim"]
        self.sigma_min, self.sigma_max = precond.sigma_min, precond.sigma_max

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
        labels = None if cond is None else cond.given.get("class_labels")
        if labels is not None and labels.shape != (len(x), self.label_dim):
            wanted = f"the network takes [{len(x)}, {self.label_dim}]"
            raise ValueError(f"class_labels are {list(labels.shape)}, {wanted}")
        state = x if x.dtype == torch.float64 else x.float()
        scaling = self.precond(sigma.to(state).expand(len(x)))
        noise = scaling.noise.to(torch.promote_types(self.dtype, torch.float32))
        out = self.model((rows(scaling.into) * state).to(self.dtype), noise, labels)
        return (rows(scaling.skip) * state + rows(scaling.out) * out.to(state)).to(x.dtype)

    def cast(self, dtype: torch.dtype) -> "EDMNetwork":
        """Run the network in `dtype`, in place."""
        for name, module in self.model.named_modules():
            if name == "map_noise" or next(module.children(), None) is not None:
                continue
            embeds = name.startswith("map_") or name.endswith(".affine")
            module.to(torch.promote_types(dtype, torch.float32) if embeds else dtype)
        return self


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


def pixel_backend(network: EDMNetwork, device: torch.device) -> Backend:
    """A preconditioned network on pixels in [-1, 1] as a backend; a prompt is a class number."""
    classes, side = network.label_dim, network.img_resolution

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        if all(prompt is None for prompt in prompts):
            return None
        chosen = [p for p in prompts if isinstance(p, int)]
        if len(chosen) != len(prompts):
            raise ValueError(f"this network takes a class number for every image, not {prompts}")
        return class_condition(torch.tensor(chosen), classes, device=device)

    def usual_prompt(seed: int) -> Prompt:
        return int(randint([seed], classes, stream="class")) if classes else None

    return Backend(
        family="edm",
        denoise=network,
        encode=encode,
        decode=pixels,
        guide=classifier_free,
        levels=NoiseLevels(
            VE, max(SIGMA_MIN, network.sigma_min), min(SIGMA_MAX, network.sigma_max)
        ),
        shape=(network.img_channels, side, side),
        size=(side, side),
        device=device,
        dtype=network.dtype,
        usual_prompt=usual_prompt,
    )


# --- files --------------------------------------------------------------------------------------


Stored: TypeAlias = tuple[str, dict[str, Any], dict[str, Tensor]]
"""What a network file says: a class, its arguments, and tensors under published names."""


def build_edm(precond: str, arguments: Mapping[str, Any]) -> EDMNetwork:
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
            raise ValueError(f"{name} must be a number from 0, not {shown(value)}")
    if not isinstance(arguments.get("use_fp16", False), bool):
        raise ValueError(f"use_fp16 must be true or false, not {shown(arguments['use_fp16'])}")
    arguments = {
        "label_dim": 0,
        "model_type": "DhariwalUNet" if class_name == "EDMPrecond" else "SongUNet",
        **{k: v for k, v in arguments.items() if k not in own or isfinite(v)},
    }
    inner = {k: v for k, v in arguments.items() if k not in own and k not in OUTER}
    inner |= {k: arguments[k] for k in ("img_resolution", "label_dim")}
    inner |= dict.fromkeys(("in_channels", "out_channels"), arguments["img_channels"])
    model = build_unet(arguments["model_type"], inner)
    network = EDMNetwork(model, PRECONDS[class_name](**scalars), class_name, arguments).eval()
    return network.to(memory_format=torch.channels_last)


def load_edm(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
) -> EDMNetwork:
    """A network from a folder of ours or from an NVIDIA `.pkl`, run in `dtype`, without gradients.

    The file's `use_fp16` is kept but not obeyed: `dtype` alone decides. On a CPU the weights are
    `channels_last` always, where convolutions are about 1.5 times as fast. Raises ValueError, in
    one line, on a path that is neither and on a broken or foreign file.
    """
    network = opened(Path(path)).cast(dtype).to(device)
    if channels_last or torch.device(device).type == "cpu":
        network.to(memory_format=torch.channels_last)
    return network.requires_grad_(False)


def opened(path: Path) -> EDMNetwork:
    """The network with the very tensors of its file; ValueError where they are not its own."""
    if not path.exists():
        raise ValueError(f"no network at {path}; give a folder with {CONFIG} or a .pkl file")
    class_name, arguments, state = read_pickled(path) if path.is_file() else read_folder(path)
    try:
        with torch.device("meta"):
            network = build_edm(class_name, arguments)
        own = network.state_dict()
        for what, names in (("lacks", own.keys() - state), ("has a foreign", state.keys() - own)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"the file {what} {min(names)}{more}, for a {class_name}")
        for name, value in state.items():
            if value.shape != own[name].shape:
                wanted = list(own[name].shape)
                raise ValueError(f"{name} is {list(value.shape)} in the file, must be {wanted}")
            if not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"{name} holds values that are no finite floats")
    except (ValueError, ArithmeticError) as e:
        raise ValueError(f"{path}: {e}") from e
    network.load_state_dict(state, assign=True)
    return network


def read_pickled(path: Path) -> Stored:
    """The network under "ema" of an NVIDIA pickle, nothing of which is run; else ValueError."""
    content = read_pickle(path)
    ema: object = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Inert):
        raise ValueError(f'{path}: no network under "ema"; it is not an EDM network pickle')
    if ema.class_name not in PRECONDS:
        served = ", ".join(PRECONDS)
        raise ValueError(f"{path}: a network of class {ema.class_name!r}; known: {served}")
    own = [field.name for field in fields(PRECONDS[ema.class_name])]
    names = [*OUTER[:-1], *own, OUTER[-1]]  # the published order
    given, named = ema.state.get("_init_args", ()), ema.state.get("_init_kwargs", {})
    if not isinstance(given, list | tuple) or not isinstance(named, dict):
        raise ValueError(f"{path}: the {ema.class_name} does not tell its init arguments")
    if len(given) > len(names):
        most = f"takes {len(names)} arguments by position at most"
        raise ValueError(f"{path}: {ema.class_name} {most}")
    arguments = {**dict(zip(names, given, strict=False)), **named}
    modules = ema.state.get("_modules")
    model = modules.get("model") if isinstance(modules, dict) else None
    if isinstance(model, Inert):
        arguments["model_type"] = model.class_name
    return ema.class_name, arguments, module_tensors(ema)


def read_folder(folder: Path) -> Stored:
    """The network of a folder of ours; ValueError, in one line with the path, for another one."""
    try:
        config = from_json((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
        state = load_file(folder / WEIGHTS)
    except OSError as e:
        name = Path(str(e.filename or WEIGHTS)).name
        raise ValueError(f"{folder}: cannot read {name}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{folder / CONFIG}: not JSON: {one_line(e)}") from e
    except SafetensorError as e:
        raise ValueError(f"{folder / WEIGHTS}: not a safetensors file: {one_line(e)}") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: not a network of format {FORMAT}")
    class_name, arguments = config.get("class"), config.get("arguments")
    if not isinstance(class_name, str) or not isinstance(arguments, dict):
        raise ValueError(f"{folder / CONFIG}: needs a class and its arguments")
    return class_name, arguments, state


def one_line(error: Exception) -> str:
    """Its text without line breaks."""
    return " ".join(str(error).split())


def save_edm(
    folder: Path | str,
    network: EDMNetwork,
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
        save_file(state, part)
    write_json(folder / CONFIG, config)


@click.group(cls=OneLineGroup)
def main() -> None:
    """Networks of the EDM family."""


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def convert(source: Path, target: Path) -> None:
    """Turn SOURCE, an NVIDIA .pkl, into TARGET, a folder of safetensors and JSON.

    Example: python -m backends.edm convert edm-cifar10-32x32-cond-vp.pkl models/cifar10
    """
    if target.suffix == ".pkl":
        raise ValueError(f"{target}: NVIDIA's pickles are only read: name a folder")
    network = opened(source)
    save_edm(target, network)
    count = sum(p.numel() for p in network.parameters())
    click.echo(f"{target}: {network.class_name}, {count:,} parameters")


if __name__ == "__main__":
    main()
