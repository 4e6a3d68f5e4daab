"""`imagereward` against its formulas written out, on a twin of the published layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import imagereward
from rewards.base import score
from rewards.imagereward import ImageReward, Sizes, load_state
from rewards.registry import Setup, Shelf
from tests.rewards.test_pixels import by_pillow
from tests.rewards.twins import PROMPTS, head_state, images

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "fox",
    "two",
    "cats",
    "on",
    "the",
]
TINY = Sizes(
    image=32,
    patch=8,
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    text_width=24,
    text_layers=2,
    text_heads=3,
    vocabulary=20,
    positions=40,
    tokens=9,
)
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes(s: Sizes) -> Shapes:
    w, shapes = s.vision_width, {}
    shapes["cls_token"] = (1, 1, w)
    shapes["pos_embed"] = (1, (s.image // s.patch) ** 2 + 1, w)
    shapes["patch_embed.proj.weight"] = (w, 3, s.patch, s.patch)
    shapes["patch_embed.proj.bias"] = (w,)
    for i in range(s.vision_layers):
        shapes |= norm(f"blocks.{i}.norm1", w) | norm(f"blocks.{i}.norm2", w)
        shapes |= linear(f"blocks.{i}.attn.qkv", w, 3 * w) | linear(f"blocks.{i}.attn.proj", w, w)
        shapes |= linear(f"blocks.{i}.mlp.fc1", w, 4 * w)
        shapes |= linear(f"blocks.{i}.mlp.fc2", 4 * w, w)
    return shapes | norm("norm", w)


def text_shapes(s: Sizes) -> Shapes:
    w, shapes = s.text_width, {}
    shapes["embeddings.position_ids"] = (1, s.positions)
    shapes["embeddings.word_embeddings.weight"] = (s.vocabulary, w)
    shapes["embeddings.position_embeddings.weight"] = (s.positions, w)
    shapes |= norm("embeddings.LayerNorm", w)
    for i in range(s.text_layers):
        layer = f"encoder.layer.{i}"
        for kind, source in (("attention", w), ("crossattention", s.vision_width)):
            shapes |= linear(f"{layer}.{kind}.self.query", w, w)
            shapes |= linear(f"{layer}.{kind}.self.key", source, w)
            shapes |= linear(f"{layer}.{kind}.self.value", source, w)
            shapes |= linear(f"{layer}.{kind}.output.dense", w, w)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", w)
        shapes |= linear(f"{layer}.intermediate.dense", w, 4 * w)
        shapes |= linear(f"{layer}.output.dense", 4 * w, w)
        shapes |= norm(f"{layer}.output.LayerNorm", w)
    return shapes


def published_shapes(s: Sizes) -> Shapes:
    """The names and shapes of ImageReward.pt."""
    shapes = {f"blip.visual_encoder.{k}": v for k, v in vision_shapes(s).items()}
    shapes |= {f"blip.text_encoder.{k}": v for k, v in text_shapes(s).items()}
    shapes |= linear("blip.vision_proj", s.vision_width, 256)
    shapes |= linear("blip.text_proj", s.text_width, 256)
    widths = (s.text_width, 1024, 128, 64, 16, 1)
    for place, i, o in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= linear(f"mlp.layers.{place}", i, o)
    return shapes


def published_state(s: Sizes = TINY) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(s).items():
        inputs = torch.Size(shape[1:]).numel() if len(shape) > 1 else 16
        around = float(len(shape) == 1 and name.endswith("weight"))
        state[name] = around + torch.randn(shape, generator=g) / inputs**0.5
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(s.positions)[None]
    return state | {f"mlp.{k}": v for k, v in head_state(s.text_width).items()}


class Reference:
    """ImageReward in plain functions of its published state dict."""

    def __init__(self, state: dict[str, Tensor], sizes: Sizes) -> None:
        self.state, self.sizes = state, sizes

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v))
        share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (share @ v).transpose(-2, -3).flatten(-2)

    def see(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        s, w = self.state, f"{root}.patch_embed.proj"
        x = F.conv2d(pixels, s[f"{w}.weight"], s[f"{w}.bias"], stride=self.sizes.patch)
        x = x.flatten(2).transpose(1, 2)
        x = (
            torch.cat([s[f"{root}.cls_token"].expand(len(x), -1, -1), x], 1)
            + s[f"{root}.pos_embed"]
        )
        for i in range(self.sizes.vision_layers):
            b = f"{root}.blocks.{i}"
            q, k, v = self.linear(f"{b}.attn.qkv", self.norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
            mixed = self.attend(q, k, v, self.sizes.vision_heads)
            x = x + self.linear(f"{b}.attn.proj", mixed)
            grown = F.gelu(self.linear(f"{b}.mlp.fc1", self.norm(f"{b}.norm2", x, 1e-6)))
            x = x + self.linear(f"{b}.mlp.fc2", grown)
        return self.norm(f"{root}.norm", x, 1e-6)

    def ask(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        q = self.linear(f"{name}.self.query", x)
        k, v = (self.linear(f"{name}.self.{part}", context) for part in ("key", "value"))
        mixed = self.attend(q, k, v, self.sizes.text_heads)
        mixed = self.linear(f"{name}.output.dense", mixed)
        return self.norm(f"{name}.output.LayerNorm", mixed + x, 1e-12)

    def score(self, pixels: Tensor, tokens: list[int]) -> float:
        """Of one image [1, 3, S, S] and a prompt's tokens, without filling."""
        root, s = "blip.text_encoder", self.state
        seen = self.see(pixels)
        x = s[f"{root}.embeddings.word_embeddings.weight"][tokens]
        x = x + s[f"{root}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{root}.embeddings.LayerNorm", x, 1e-12)[None]
        for i in range(self.sizes.text_layers):
            layer = f"{root}.encoder.layer.{i}"
            x = self.ask(f"{layer}.attention", x, x)
            x = self.ask(f"{layer}.crossattention", x, seen)
            grown = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            grown = self.linear(f"{layer}.output.dense", grown)
            x = self.norm(f"{layer}.output.LayerNorm", grown + x, 1e-12)
        x = x[:, 0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return (float(x) - 0.16717362830052426) / 1.0333394966054072


TOKENS = [[2, 5, 6, 7, 3], [2, 8, 9, 10, 5, 1, 3], [2, 5, 6, 7, 3], [2, 1, 3]]
"""Of PROMPTS: [CLS], the words that are known, [SEP]."""


def written(folder: Path, state: dict[str, Tensor]) -> Setup:
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return Setup(paths={"imagereward": folder / "ImageReward.pt", "bert": folder})


def twin(folder: Path) -> ImageReward:
    return imagereward.load(Shelf(written(folder, published_state())), TINY)


def test_it_is_the_published_formula(tmp_path: Path) -> None:
    reference, pixels = Reference(published_state(), TINY), by_pillow(images(), 32)
    expected = [reference.score(pixels[i : i + 1], t) for i, t in enumerate(TOKENS)]
    ours = score(twin(tmp_path), images(), PROMPTS)
    assert ours.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert ours.std() > 0.01


def test_a_batch_scores_as_its_images_one_by_one(tmp_path: Path) -> None:
    reward = twin(tmp_path)
    alone = [score(reward, images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    together = score(reward, images(), PROMPTS)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_half_precision_stays_near(tmp_path: Path) -> None:
    whole = score(twin(tmp_path), images(), PROMPTS)
    setup = replace(written(tmp_path, published_state()), amp=True)
    near = score(imagereward.load(Shelf(setup), TINY), images(), PROMPTS)
    assert 0 < (near - whole).abs().max() < 0.1


def test_prompts_are_filled_and_cut_to_a_length(tmp_path: Path) -> None:
    tokens = twin(tmp_path).tokens(["A red fox", "cats " * 30])
    assert tokens[0].tolist() == [[2, 5, 6, 7, 3, 0, 0, 0, 0], [1] * 5 + [0] * 4]
    assert tokens[1, 0].tolist() == [2, *[9] * 7, 3]


def test_the_published_size_loads_strictly() -> None:
    meta = torch.device("meta")
    shapes = published_shapes(Sizes())
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (
        768,
        1024,
    )
    state = {name: torch.empty(shape, device=meta) for name, shape in shapes.items()}
    load_state(state, Sizes(), "full", meta)
    for name in ("mlp.layers.7.bias", "blip.visual_encoder.norm.bias"):
        with pytest.raises(ValueError, match="full: these are other weights: 1 missing"):
            load_state({k: v for k, v in state.items() if k != name}, Sizes(), "full", meta)


def test_a_parameter_that_is_not_known_is_refused(tmp_path: Path) -> None:
    setup = written(tmp_path, {**published_state(), "blip.more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"ImageReward\.pt: .*1 not known \(blip\.more\)"):
        imagereward.load(Shelf(setup), TINY)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither vocab\.txt nor tokenizer\.json"):
        imagereward.tokenizer(tmp_path, TINY)


def test_a_vocabulary_that_is_too_large_is_refused(tmp_path: Path) -> None:
    setup = written(tmp_path, published_state(replace(TINY, vocabulary=6)))
    with pytest.raises(ValueError, match="12 tokens, more than the 6 known"):
        imagereward.load(Shelf(setup), replace(TINY, vocabulary=6))
