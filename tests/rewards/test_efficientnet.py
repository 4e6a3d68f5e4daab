"""The judges that ship: `efficientnet-minilm` and its features, `fashion-judge`."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rewards import efficientnet_minilm as module
from rewards.base import has_gradient, score
from rewards.efficientnet import SIZE, Features, load_features, prepared
from rewards.efficientnet_minilm import EmojiScore, load_minilm
from rewards.fashion import WEIGHTS as JUDGE
from rewards.fashion import load_judge
from rewards.registry import Setup
from tests.rewards.networks import PROMPTS, WORDS, images, shaken, transformers

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
    return module.load(Setup(paths={"minilm": minilm}))


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


# --- what is missing or wrong -----------------------------------------------------------------


def test_other_files_and_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model_type is not bert"):
        load_minilm(tmp_path, CPU)
    save_file({"a": torch.ones(2)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"e\.safetensors: these are other weights: Missing"):
        load_features(path=tmp_path / "e.safetensors")
    for shape in ((2, 32, 32), (2, 4, 32, 32)):
        with pytest.raises(ValueError, match="1 or 3"):
            prepared(torch.zeros(shape))


# --- fashion-judge ----------------------------------------------------------------------------


def test_the_judge_of_clothes_scores_classes_by_number_and_name_with_a_gradient(
    tmp_path: Path,
) -> None:
    judge, given = load_judge(), images(3, 32, 32).requires_grad_()
    assert JUDGE.stat().st_size < 1_000_000
    log_p = torch.stack([judge(given, [str(i)] * 3) for i in range(10)], 1)
    assert log_p.exp().sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert torch.equal(log_p, judge.log_probabilities(given))
    scores = judge(given, ["7", "sneaker", "T-shirt/top"])
    assert scores.tolist() == log_p[[0, 1, 2], [7, 7, 0]].tolist()
    assert has_gradient(judge, prompt="7")
    assert judge.features(given[:, :1, 2:30, 2:30]).shape == (3, 128)
    tall = given.repeat_interleave(2, 2)  # 64 x 32: brought to the square that it was made of
    torch.testing.assert_close(judge.log_probabilities(tall), log_p, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'hat' is no class"):
        judge(given, ["hat"] * 3)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        load_judge(tmp_path / "other.safetensors")
