"""The reference packages' own numbers for tests/data/parity.json, by their own code.

The packages run on old libraries, so they need an environment of their own, with Python 3.10:

    pip install torch==2.2.2 torchvision==0.17.2 numpy==1.26.4 pillow==10.4.0 \
        hpsv2==1.2.0 image-reward==1.5 openai-clip==1.0.1 CoCa-pytorch==0.1.0 \
        transformers==4.27.4 timm==0.6.13 huggingface-hub==0.13.4 diffusers==0.16.1 \
        accelerate==0.20.3 datasets==2.11.0 pandas==2.1.4 pyarrow==14.0.2 \
        protobuf==3.20.3 pytest==7.2.0

Ours writes what is asked about, theirs answers in JSON:

    python -c "from pathlib import Path; from tests.rewards.test_parity import write; \
        write(Path('build/parity'))"
    OLD_ENVIRONMENT/bin/python tests/rewards/references.py build/parity > answers.json

Only sizes, and places of files that the packages would download, are replaced in them. The
numbers of distances in parity.json are those of torch-fidelity, pytorch-fid, clean-fid and
torchmetrics on the features of test_parity.py; names and shapes are those of the packages'
networks at their published sizes.
"""

import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
BERT |= {"add_cross_attention": True}
"""Of med_config.json of the hub's THUDM/ImageReward; its sizes are those of the twin."""


def module(name: str) -> Any:
    return importlib.import_module(name)


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def pairs(folder: Path) -> list[tuple[str, str]]:
    """Files of pictures, each with its prompt."""
    return [(str(folder / f"{i}.png"), p) for i, p in enumerate(content(folder, "prompts.json"))]


def hps(folder: Path) -> list[float]:
    """hpsv2.score; its network has other sizes, and LAION's weights are not fetched first."""
    sys.modules["turtle"] = types.ModuleType("turtle")  # imported there by mistake: needs Tk
    sys.modules["turtle"].__dict__["forward"] = None
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"  # which its wheel forgot
    places: Any = [find_spec(package) for package in ("clip", "hpsv2")]
    own, to = (Path(spec.submodule_search_locations[0]) for spec in places)
    if not (to / "src" / "open_clip" / vocabulary).exists():
        shutil.copy(str(own / vocabulary), str(to / "src" / "open_clip" / vocabulary))
    library = module("hpsv2.src.open_clip")
    library.add_model_config(folder / "ViT-H-14.json")
    network = library.create_model_and_transforms(
        "ViT-H-14", None, precision="fp32", light_augmentation=True, output_dict=True
    )
    package = module("hpsv2.img_score")
    package.model_dict.update(model=network[0], preprocess_val=network[2])
    asked = pairs(folder)[:8]  # it sees all of a picture that is not square, between black bars
    return [float(package.score(path, text, str(folder / "hps.pt"))[0]) for path, text in asked]


def imagereward(folder: Path) -> list[float]:
    """ImageReward.load and score; its networks have other sizes."""
    package, sizes = module("ImageReward.ImageReward"), content(folder, "imagereward.json")
    blip, vit = module("ImageReward.models.BLIP.blip"), module("ImageReward.models.BLIP.vit")
    own, heads = blip.BertTokenizer, package.MLP
    words = types.SimpleNamespace(from_pretrained=lambda _: own(str(folder / "vocab.txt")))
    blip.BertTokenizer = words

    def create_vit(*_: Any) -> tuple[Any, int]:
        names = {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "hidden_size"}
        names |= {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
        own = {name: sizes["vision"][ours] for name, ours in names.items()}
        return vit.VisionTransformer(**own), sizes["vision"]["hidden_size"]

    module("ImageReward.models.BLIP.blip_pretrain").create_vit = create_vit
    package.MLP = lambda _: heads(sizes["text"]["hidden_size"])
    config = {**BERT, **sizes["text"]}
    (folder / "med_config.json").write_text(json.dumps(config))
    load = module("ImageReward.utils").load
    model = load(str(folder / "imagereward.pt"), "cpu", None, str(folder / "med_config.json"))
    model.preprocess = package._transform(sizes["image"])
    return [model.score(text, path) for path, text in pairs(folder)]


def openai_score(folder: Path, name: str) -> Any:
    """A score of image-reward that sits on OpenAI's CLIP, whose weights are a file here."""
    module("ImageReward")
    package = module(f"ImageReward.models.{name}")
    library = package.clip
    network = library.model.build_model(torch.load(str(folder / "clip.pt"))).eval()
    library.load = lambda *_, **__: (
        network,
        library.clip._transform(network.visual.input_resolution),
    )
    return getattr(package, name)("", "cpu").eval()


def clip(folder: Path) -> list[float]:
    model = openai_score(folder, "CLIPScore")
    return [model.score(text, path) for path, text in pairs(folder)]


def aesthetic(folder: Path) -> list[float]:
    model = openai_score(folder, "AestheticScore")
    model.mlp.load_state_dict(torch.load(str(folder / "aesthetic.pth")))
    return [model.score(text, path) for path, text in pairs(folder)]


def clip_model(folder: Path, state: Mapping[str, Any]) -> Any:
    """transformers' CLIPModel of the small sizes."""
    library = module("transformers")
    sizes = content(folder, "clip_model.json")
    network = library.CLIPModel(library.CLIPConfig(projection_dim=12, **sizes)).eval()
    network.load_state_dict(state, strict=False)
    assert {n for n in network.state_dict() if not n.endswith("position_ids")} == set(state)
    return network


def tokens(text: str) -> Any:
    """By OpenAI's tokenizer, filled up with the end of text as transformers does."""
    rows = module("clip").tokenize(text, truncate=True)
    return rows.masked_fill(torch.arange(77) > rows.argmax(1, keepdim=True), 49407).long()


def pixels(path: str) -> Any:
    """By transformers' image processor."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    prepare = module("transformers").CLIPImageProcessor(**sizes)
    return prepare(Image.open(path), return_tensors="pt")["pixel_values"]


def pickscore(folder: Path) -> list[float]:
    """transformers' CLIPModel, asked as the model's card does."""
    network, scores = clip_model(folder, torch.load(str(folder / "pickscore.pt"))), []
    for path, text in pairs(folder):
        seen = network.get_image_features(pixel_values=pixels(path))
        read = network.get_text_features(input_ids=tokens(text))
        seen, read = (x / x.norm(dim=-1, keepdim=True) for x in (seen, read))
        scores.append(float(network.logit_scale.exp() * (read @ seen.T)[0, 0]))
    return scores


def layers(case: Mapping[str, Any], state: Mapping[str, Any], kind: torch.dtype) -> Any:
    """The stack of MPS, of CoCa's blocks, from which it was made: names of norms differ."""
    library = module("coca_pytorch.coca_pytorch")
    sizes = {k: case[k] for k in ("dim_head", "heads", "ff_mult")}
    stack = torch.nn.ModuleList()
    for _ in range(case["layer_num"]):
        own = library.ParallelTransformerBlock(case["dim"], **sizes)
        own.get_mask = lambda n, *_: torch.zeros(n, n, dtype=torch.bool)  # no order in images
        cross = library.CrossAttention(case["dim"], parallel_ff=True, **sizes)
        stack.append(torch.nn.ModuleList([library.Residual(cross), library.Residual(own)]))
    named = {"layers." + n.replace("gamma", "weight"): n for n in stack.state_dict()}
    unused = {n for n in named if n.endswith(("beta", "inv_freq"))}
    assert set(named) - unused == set(state), set(named) ^ set(state)
    stack.load_state_dict({named[n]: v for n, v in state.items()}, strict=False)
    return stack.to(kind)


def ask(stack: Any, queries: Any, context: Any) -> Any:
    """The first image token. Text tokens that are masked are not in `context`."""
    for cross, own in stack:
        queries = own(cross(queries, context))
    return queries[:, 0]


def mps_stack(folder: Path) -> list[float]:
    rows = []
    for one in torch.load(str(folder / "stacks.pt")):
        stack = layers(one["case"], one["state"], torch.float64)
        queries, context = one["waves"]
        kept = [i for i in range(context.shape[1]) if i not in one["masked"]]
        rows.append(ask(stack, queries, context[:, kept]).flatten())
    return torch.cat(rows).tolist()


def mps(folder: Path) -> list[float]:
    """The paper's formula on transformers' CLIPModel and CoCa's blocks."""
    state, case = torch.load(str(folder / "mps.pt")), content(folder, "mps.json")
    state = {n: v for n, v in state.items() if not n.endswith((".norm.bias", ".position_ids"))}
    own = {n[6:]: v for n, v in state.items() if n.startswith("model.")}
    rest = {n[12:]: v for n, v in state.items() if n.startswith("cross_model.")}
    network, stack = clip_model(folder, own), layers(case, rest, torch.float32)

    def read(text: str) -> tuple[Any, Any]:
        out = network.text_model(tokens(text))
        both = out.last_hidden_state[0], out.pooler_output[0]
        return network.text_projection(both[0]), network.text_projection(both[1])

    condition, scores = read(case["condition"])[0], []
    for path, text in pairs(folder):
        words, embedding = read(text)
        near = (words @ condition.T).amax(1)
        kept = words[near / near.max() > 0.3]
        seen = network.vision_model(pixels(path)).last_hidden_state
        x = ask(stack, network.visual_projection(seen), kept[None])[0]
        cosine = torch.cosine_similarity(embedding, x, dim=0)
        scores.append(float(network.logit_scale.exp() * cosine))
    return scores


REFERENCES: tuple[Callable[[Path], list[float]], ...] = (
    *(hps, clip, aesthetic, imagereward, pickscore, mps, mps_stack),
)


def main(folder: Path) -> None:
    """Write all answers, whatever the packages print meanwhile; failures go to the errors."""
    out, sys.stdout, answers = sys.stdout, sys.stderr, {}
    torch.set_num_threads(1)
    with torch.no_grad():
        for reference in REFERENCES:
            answers[reference.__name__] = {"numbers": reference(folder)}
    out.write(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
