"""The references' own numbers, by their own code, in the environment of requirements.txt.

    python tests/parity/theirs.py NAME FOLDER

writes JSON to the standard output: the packages, and the numbers of the files of `cases.write`,
or the names and shapes of the published size. Only sizes, and places of files that the packages
would download, are replaced in them; each place says which.
"""

import importlib
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Answer = tuple[list[str], Any]
"""The packages that were asked, and what they say."""
BERT = {
    "architectures": ["BertModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,
}
"""med_config.json of the hub's THUDM/ImageReward."""


def module(name: str) -> Any:
    return importlib.import_module(name)


def told(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def pairs(folder: Path) -> list[tuple[str, str]]:
    """Files of pictures, each with its prompt."""
    return [(str(folder / f"{i}.png"), p) for i, p in enumerate(told(folder, "prompts.json"))]


def folder_of(package: str) -> Path:
    """Where a package is, without importing it."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    return Path(next(iter(spec.submodule_search_locations)))


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names and shapes; alike ones of layers 0 to n - 1 are one entry {name: [n, shape]}."""
    groups: dict[str, dict[int, list[int]]] = {}
    for name, value in state.items():
        number = re.search(r"\.(\d+)\.", name)
        key = f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}" if number else name
        groups.setdefault(key, {})[int(number[1]) if number else 0] = list(value.shape)
    made: dict[str, Any] = {}
    for key, shapes in groups.items():
        first, count = next(iter(shapes.values())), len(shapes)
        if shapes == dict.fromkeys(range(count), first) and "{}" in key:
            made[key] = [count, first]
        else:
            made.update({key.replace("{}", str(n)): [1, shape] for n, shape in shapes.items()})
    return made


def hpsv2() -> Any:
    """hpsv2's open_clip, with the vocabulary that its wheel forgot, from OpenAI's package."""
    sys.modules["turtle"] = types.ModuleType("turtle")  # imported there by mistake: needs Tk
    sys.modules["turtle"].__dict__["forward"] = None
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    to = folder_of("hpsv2") / "src" / "open_clip" / vocabulary
    if not to.exists():
        shutil.copy(str(folder_of("clip") / vocabulary), str(to))
    return module("hpsv2.src.open_clip")


def hps(folder: Path) -> Answer:
    """hpsv2.score; its network has other sizes, and LAION's weights are not fetched first."""
    library = hpsv2()
    library.add_model_config(folder / "ViT-H-14.json")
    made = library.create_model_and_transforms(
        "ViT-H-14", None, precision="fp32", light_augmentation=True, output_dict=True
    )
    package = module("hpsv2.img_score")
    package.model_dict.update(model=made[0], preprocess_val=made[2])
    weights = str(folder / "hps.pt")
    asked = pairs(folder)[:8]  # it sees all of a picture that is not square, between black bars
    return ["hpsv2"], [float(package.score(path, text, weights)[0]) for path, text in asked]


def hps_names(_: Path) -> Answer:
    library = hpsv2()
    with torch.device("meta"):
        network = library.CLIP(**library.get_model_config("ViT-H-14"))
    return ["hpsv2"], packed(network.state_dict())


def image_reward(vocabulary: Path) -> Any:
    """image-reward, with a tokenizer from a file."""
    package = module("ImageReward.ImageReward")
    blip = module("ImageReward.models.BLIP.blip")
    own = blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: own(str(vocabulary)))
    return package


def imagereward(folder: Path) -> Answer:
    """ImageReward.load and score; its networks have other sizes."""
    package, sizes = image_reward(folder / "vocab.txt"), told(folder, "imagereward.json")
    vit, heads = module("ImageReward.models.BLIP.vit"), package.MLP

    def create_vit(*_: Any) -> tuple[Any, int]:
        made = vit.VisionTransformer(
            img_size=sizes["image"],
            patch_size=sizes["patch"],
            embed_dim=sizes["vision_width"],
            depth=sizes["vision_layers"],
            num_heads=sizes["vision_heads"],
        )
        return made, sizes["vision_width"]

    module("ImageReward.models.BLIP.blip_pretrain").create_vit = create_vit
    package.MLP = lambda _: heads(sizes["text_width"])
    load = module("ImageReward.utils").load
    model = load(str(folder / "imagereward.pt"), "cpu", None, str(folder / "med_config.json"))
    model.preprocess = package._transform(sizes["image"])
    return ["image-reward"], [model.score(text, path) for path, text in pairs(folder)]


def imagereward_names(folder: Path) -> Answer:
    package, config = image_reward(folder / "vocab.txt"), folder / "bert.json"
    config.write_text(json.dumps(BERT))
    return ["image-reward"], packed(package.ImageReward(str(config)).state_dict())


def openai_score(folder: Path, name: str) -> Any:
    """A score of image-reward that sits on OpenAI's CLIP, whose weights are a file here."""
    module("ImageReward")
    package = module(f"ImageReward.models.{name}")
    library = package.clip
    made = library.model.build_model(torch.load(str(folder / "clip.pt"))).eval()
    library.load = lambda *_, **__: (made, library.clip._transform(made.visual.input_resolution))
    return getattr(package, name)("", "cpu").eval()


def clip(folder: Path) -> Answer:
    """image-reward's CLIPScore."""
    model = openai_score(folder, "CLIPScore")
    scores = [model.score(text, path) for path, text in pairs(folder)]
    return ["image-reward", "openai-clip"], scores


def clip_names(_: Path) -> Answer:
    """Those of OpenAI's ViT-L/14."""
    with torch.device("meta"):
        network = module("clip.model").CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)
    return ["openai-clip"], packed(network.state_dict())


def open_clip(folder: Path) -> Answer:
    """The same by open_clip."""
    library = module("open_clip")
    network = library.CLIP(**told(folder, "clip.json")).eval()
    network.load_state_dict(torch.load(str(folder / "clip.pt")))
    prepare = library.image_transform(32, is_train=False)
    tokenise, scores = library.get_tokenizer("ViT-L-14"), []
    with torch.no_grad():
        for path, text in pairs(folder):
            seen = network.encode_image(prepare(Image.open(path))[None], normalize=True)
            scores.append(float(seen @ network.encode_text(tokenise([text]), normalize=True).T))
    return ["open_clip_torch"], scores


def aesthetic(folder: Path) -> Answer:
    """image-reward's AestheticScore."""
    model = openai_score(folder, "AestheticScore")
    model.mlp.load_state_dict(torch.load(str(folder / "aesthetic.pth")))
    scores = [model.score(text, path) for path, text in pairs(folder)]
    return ["image-reward", "openai-clip"], scores


def aesthetic_names(_: Path) -> Answer:
    head = module("ImageReward.models.AestheticScore").MLP(768)
    return ["image-reward"], packed(head.state_dict())


def clip_model(folder: Path, state: Mapping[str, Any]) -> Any:
    """transformers' CLIPModel of the small sizes."""
    library = module("transformers")
    sizes = told(folder, "clip_model.json")
    network = library.CLIPModel(library.CLIPConfig(projection_dim=12, **sizes)).eval()
    network.load_state_dict(state, strict=False)
    assert {n for n in network.state_dict() if not n.endswith("position_ids")} == set(state)
    return network


def tokens(text: str) -> Any:
    """By OpenAI's tokenizer, filled up with the end of text as transformers does."""
    found = module("clip").tokenize(text, truncate=True)
    return found.masked_fill(torch.arange(77) > found.argmax(1, keepdim=True), 49407).long()


def pixels(path: str) -> Any:
    """By transformers' image processor."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    prepare = module("transformers").CLIPImageProcessor(**sizes)
    return prepare(Image.open(path), return_tensors="pt")["pixel_values"]


@torch.no_grad()
def pickscore(folder: Path) -> Answer:
    """transformers' CLIPModel, asked as the model's card does."""
    network, scores = clip_model(folder, torch.load(str(folder / "pickscore.pt"))), []
    for path, text in pairs(folder):
        seen = network.get_image_features(pixel_values=pixels(path))
        read = network.get_text_features(input_ids=tokens(text))
        seen, read = (x / x.norm(dim=-1, keepdim=True) for x in (seen, read))
        scores.append(float(network.logit_scale.exp() * (read @ seen.T)[0, 0]))
    return ["transformers"], scores


def pickscore_names(folder: Path) -> Answer:
    library = module("transformers")
    with torch.device("meta"):
        network = library.CLIPModel(library.CLIPConfig(**told(folder, "vit_h.json")))
    return ["transformers"], packed(network.state_dict())


def layers(case: Mapping[str, Any]) -> Any:
    """The stack of MPS, of CoCa's blocks, from which it was made: names of norms differ."""
    library, dim, count = module("coca_pytorch.coca_pytorch"), case["dim"], case["layer_num"]
    sizes = {k: case[k] for k in ("dim_head", "heads", "ff_mult") if k in case}
    stack = torch.nn.ModuleList()
    for _ in range(count):
        own = library.ParallelTransformerBlock(dim, **sizes)
        own.get_mask = lambda n, *_: torch.zeros(n, n, dtype=torch.bool)  # no order in images
        cross = library.CrossAttention(dim, parallel_ff=True, **sizes)
        pair = [library.Residual(cross), library.Residual(own)]
        stack.append(torch.nn.ModuleList(pair))
    return stack


def fill(stack: Any, state: Mapping[str, Any]) -> Any:
    """That stack with the tensors of MPS."""
    named = {"layers." + n.replace("gamma", "weight"): n for n in stack.state_dict()}
    unused = {n for n in named if n.endswith(("beta", "inv_freq"))}
    assert set(named) - unused == set(state), set(named) ^ set(state)
    stack.load_state_dict({named[n]: v for n, v in state.items()}, strict=False)
    return stack


def ask(stack: Any, queries: Any, context: Any) -> Any:
    """The first image token. Text tokens that are masked are not in `context`."""
    for cross, own in stack:
        queries = own(cross(queries, context))
    return queries[:, 0]


@torch.no_grad()
def mps_stack(folder: Path) -> Answer:
    rows = []
    for one in torch.load(str(folder / "stacks.pt")):
        stack = fill(layers(one["case"]).double(), one["state"])
        queries, context = one["waves"]
        kept = [i for i in range(context.shape[1]) if i not in one["masked"]]
        rows.append(ask(stack, queries, context[:, kept]).flatten())
    return ["CoCa-pytorch"], torch.cat(rows).tolist()


@torch.no_grad()
def mps(folder: Path) -> Answer:
    """The paper's formula on transformers' CLIPModel and CoCa's blocks."""
    state, case = torch.load(str(folder / "mps.pt")), told(folder, "mps.json")
    state = {n: v for n, v in state.items() if not n.endswith((".norm.bias", ".position_ids"))}
    own = {n[6:]: v for n, v in state.items() if n.startswith("model.")}
    network, scores = clip_model(folder, own), []
    rest = {n[12:]: v for n, v in state.items() if n.startswith("cross_model.")}
    stack = fill(layers(case), rest)

    def read(text: str) -> tuple[Any, Any]:
        found = network.text_model(tokens(text))
        both = found.last_hidden_state[0], found.pooler_output[0]
        return network.text_projection(both[0]), network.text_projection(both[1])

    condition = read(case["condition"])[0]
    for path, text in pairs(folder):
        words, embedding = read(text)
        near = (words @ condition.T).amax(1)
        kept = words[near / near.max() > 0.3]
        seen = network.vision_model(pixels(path)).last_hidden_state
        x = ask(stack, network.visual_projection(seen), kept[None])[0]
        cosine = torch.cosine_similarity(embedding, x, dim=0)
        scores.append(float(network.logit_scale.exp() * cosine))
    return ["transformers", "CoCa-pytorch"], scores


def mps_names(folder: Path) -> Answer:
    """CoCa's blocks with the widening that they have where nobody names one."""
    packages, found = pickscore_names(folder)
    with torch.device("meta"):
        state = layers({"dim": 1024, "layer_num": 4, "heads": 16}).state_dict()
    renamed = {n.replace("gamma", "weight").replace("beta", "bias"): v for n, v in state.items()}
    told = {f"model.{n}": v for n, v in found.items()}
    told.update(packed({f"cross_model.layers.{n}": v for n, v in renamed.items()}))
    return [*packages, "CoCa-pytorch"], told


def seen(folder: Path) -> list[Any]:
    """Pictures [1, 3, side, side] in bytes."""
    with np.load(str(folder / "seen.npz")) as file:
        return [torch.from_numpy(file[name]) for name in file.files]


@torch.no_grad()
def inception(folder: Path) -> Answer:
    """torch-fidelity's network and its resize."""
    library = module("torch_fidelity.feature_extractor_inceptionv3")
    weights = str(folder / "inception.pth")
    network = library.FeatureExtractorInceptionV3("inception", ["2048"], weights).eval()
    rows = [network(image)[0][0, ::128] for image in seen(folder)]
    return ["torch-fidelity"], torch.cat(rows).tolist()


@torch.no_grad()
def pytorch_inception(folder: Path) -> Answer:
    """pytorch-fid's network on what needs no resize; its weights are a file here."""
    library = module("pytorch_fid.inception")
    library.load_state_dict_from_url = lambda *_, **__: torch.load(str(folder / "inception.pth"))
    network = library.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    found = network((seen(folder)[1].float() - 128) / 128)[0]
    return ["pytorch-fid"], found[0, ::128, 0, 0].tolist()


def inception_names(folder: Path) -> Answer:
    library = module("pytorch_fid.inception")
    library.load_state_dict_from_url = lambda *_, **__: torch.load(str(folder / "inception.pth"))
    return ["pytorch-fid"], packed(library.fid_inception_v3().state_dict())


def gaussians(folder: Path) -> list[Any]:
    """Means and covariances of both sets of features."""
    sets = features(folder)
    return [part for x in sets for part in (x.mean(0), np.cov(x, rowvar=False))]


def features(folder: Path) -> list[Any]:
    with np.load(str(folder / "features.npz")) as file:
        return [file["a"], file["b"]]


def fidelity_frechet(folder: Path) -> Answer:
    library = module("torch_fidelity.metric_fid")
    mu1, sigma1, mu2, sigma2 = gaussians(folder)
    one, two = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    found = library.fid_statistics_to_metric(one, two, verbose=False)
    return ["torch-fidelity"], [float(found["frechet_inception_distance"])]


def pytorch_frechet(folder: Path) -> Answer:
    found = module("pytorch_fid.fid_score").calculate_frechet_distance(*gaussians(folder))
    return ["pytorch-fid"], [float(found)]


def clean_frechet(folder: Path) -> Answer:
    return ["clean-fid"], [float(module("cleanfid.fid").frechet_distance(*gaussians(folder)))]


def metrics_frechet(folder: Path) -> Answer:
    numbers = map(torch.from_numpy, gaussians(folder))
    return ["torchmetrics"], [float(module("torchmetrics.image.fid")._compute_fid(*numbers))]


def fidelity_kernel(folder: Path) -> Answer:
    a, b = features(folder)
    k = module("torch_fidelity.metric_kid").polynomial_mmd
    return ["torch-fidelity"], [float(k(a, b, 3, None, 1.0))]


def clean_kernel(folder: Path) -> Answer:
    a, b = features(folder)
    return ["clean-fid"], [float(module("cleanfid.fid").kernel_distance(a, b, 1, len(a)))]


def metrics_kernel(folder: Path) -> Answer:
    a, b = map(torch.from_numpy, features(folder))
    return ["torchmetrics"], [float(module("torchmetrics.image.kid").poly_mmd(a, b))]


NUMBERS: dict[str, Callable[[Path], Answer]] = {
    "hps": hps,
    "clip": clip,
    "clip.open_clip": open_clip,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
    "pickscore": pickscore,
    "mps": mps,
    "mps_stack": mps_stack,
    "inception": inception,
    "inception.pytorch-fid": pytorch_inception,
    "frechet": fidelity_frechet,
    "frechet.pytorch-fid": pytorch_frechet,
    "frechet.clean-fid": clean_frechet,
    "frechet.torchmetrics": metrics_frechet,
    "kernel": fidelity_kernel,
    "kernel.clean-fid": clean_kernel,
    "kernel.torchmetrics": metrics_kernel,
}
"""By what of ours they stand beside, a dot, and whose they are where there are several."""
NAMES: dict[str, Callable[[Path], Answer]] = {
    "hps": hps_names,
    "clip": clip_names,
    "aesthetic": aesthetic_names,
    "imagereward": imagereward_names,
    "pickscore": pickscore_names,
    "mps": mps_names,
    "inception": inception_names,
}


def main(kind: str, name: str, place: str) -> None:
    """Write the answer, whatever the packages print meanwhile."""
    out, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    packages, answer = {"numbers": NUMBERS, "names": NAMES}[kind][name](Path(place))
    by = ", ".join(f"{package} {version(package)}" for package in packages)
    out.write(json.dumps({"by": by, kind: answer}))


if __name__ == "__main__":
    main(*sys.argv[1:])
