"""Calling rewards, their gradients, sums, batches, and finding them by name."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import clip, imagereward, mps
from rewards.base import SCALES, Reward, WeightedSum, has_gradient, looking, score
from rewards.registry import Setup, load_reward, load_rewards, parse
from rewards.scorer import check_rewards, names_of, score_all
from src.runs import Stopped
from tests.pretend_gpu import pretend_gpu
from tests.rewards.networks import (
    BLIP,
    MPS_SIZES,
    OPEN_CLIP,
    PROMPTS,
    WORDS,
    PublishedMPS,
    head_state,
    imagereward_state,
    images,
    open_clip_state,
    write_clip_folder,
    write_open_clip_folder,
)

NEAR = {
    "hps": 0.05,
    "clip": 0.05,
    "aesthetic": 0.1,
    "pickscore": 0.5,
    "imagereward": 0.1,
    "mps": 1,
}
"""How far half precision may be; of logits, exp(2) times a cosine and more, farther."""


def brightness(batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return batch.mean((1, 2, 3))


def last_digit(batch: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(p[-1]) for p in prompts]).to(batch.device)


def wrong_shape(batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return batch.mean((2, 3))


def no_numbers(_batch: Tensor, _prompts: Sequence[str]) -> Tensor:
    return torch.tensor([1.0, float("nan"), 2.0, float("nan")])


def with_nan(dtype: torch.dtype) -> Tensor:
    batch = images().to(dtype)
    batch[2, 1, 3, 4] = float("nan")
    return batch


def test_an_image_in_memory_scores_as_its_bytes() -> None:
    batch = images()
    assert torch.equal(score(brightness, batch + 0.4 / 255, PROMPTS), brightness(batch, PROMPTS))
    wide = images() * 3 - 1
    assert torch.equal(
        score(brightness, wide, PROMPTS), score(brightness, wide.clamp(0, 1), PROMPTS)
    )


@pytest.mark.parametrize(
    ("batch", "prompts", "reward", "words"),
    [
        (torch.zeros(4, 1, 8, 8), PROMPTS, brightness, r"floats \[B, 3, H, W\], not .*grey"),
        (torch.zeros(4, 4, 8, 8), PROMPTS, brightness, r"floats \[B, 3, H, W\]"),
        (torch.zeros(4, 3, 0, 8), PROMPTS, brightness, r"with pixels, not \[4, 3, 0, 8\]"),
        (torch.zeros(3, 8, 8), PROMPTS, brightness, r"floats \[B, 3, H, W\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), PROMPTS, brightness, "floats.*uint8"),
        (with_nan(torch.float32), PROMPTS, brightness, r"image 2 of 4 .* holds NaN or infinity$"),
        (with_nan(torch.float16), PROMPTS, brightness, "image 2 of 4 .*float16, try float32"),
        (images(), ["one"], brightness, "4 images need as many prompts, not 1"),
        (images(), "four", brightness, "4 images need as many prompts"),
        (images(), PROMPTS, wrong_shape, r"mine must return a tensor \[4\], not \[4, 3\]"),
        (images(), PROMPTS, no_numbers, r"mine gave nan for image 1 of 4 \(and 1 more\)"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_line(
    batch: Tensor, prompts: Sequence[str], reward: Reward, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        score(reward, batch, prompts, "mine")
    assert "\n" not in str(error.value)


def test_a_reward_is_tried_on_noise_of_which_it_need_have_no_number() -> None:
    where = ((8, 6), "a", torch.device("cpu"))
    check_rewards({"mine": lambda batch, prompts: no_numbers(batch, prompts)[:2]}, *where)
    for reward, words in (
        (wrong_shape, r"^mine must return a tensor \[2\], not \[2, 3\]$"),
        (last_digit, "^mine: could not convert string to float: 'a'$"),
        (lambda batch, _: batch.nothing, r"^mine fails on float32 \[2, 3, 8, 6\]: AttributeError"),
    ):
        with pytest.raises(ValueError, match=words):
            check_rewards({"sum": WeightedSum({"mine": reward}, {"mine": 1.0}, {})}, *where)


# --- gradients --------------------------------------------------------------------------------


def test_it_is_said_which_rewards_have_a_gradient_and_it_passes_the_rounding(
    tmp_path: Path,
) -> None:
    batch = images().requires_grad_()
    (slope,) = torch.autograd.grad(score(brightness, batch, PROMPTS).sum(), batch)
    assert torch.allclose(slope, torch.full_like(slope, 1 / slope[0].numel()))
    assert not score(brightness, images(), PROMPTS).requires_grad
    folder = write_open_clip_folder(tmp_path / "clip")
    clip = load_reward("clip", Setup(paths={"clip": folder}))
    assert has_gradient(brightness)
    assert has_gradient(WeightedSum({"clip": clip}, {"clip": 1.0}, SCALES))
    assert not has_gradient(lambda batch, _: (batch > 0.5).float().mean((1, 2, 3)))
    assert not has_gradient(lambda batch, _: batch.detach().mean((1, 2, 3)))


def every_reward(folder: Path, device: str, *, amp: bool) -> dict[str, Reward]:
    """Each on its twin."""
    folder.mkdir(exist_ok=True)
    write_clip_folder(folder / "pickscore")
    write_open_clip_folder(folder / "clip")
    torch.save(open_clip_state(), folder / "hps.pt")
    torch.save(head_state(16), folder / "aesthetic.pth")
    torch.save(imagereward_state(), folder / "imagereward.pt")
    torch.save(PublishedMPS(None), folder / "mps.pth")
    paths = {path.stem: path for path in folder.iterdir()} | {"bert": folder}
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    setup = Setup(torch.device(device), amp, paths)
    return {
        "hps": clip.load_hps(setup, OPEN_CLIP),
        "pickscore": clip.load_pickscore(setup),
        "clip": clip.load_clip(setup),
        "aesthetic": clip.load_aesthetic(setup),
        "imagereward": imagereward.load(setup, BLIP, 9),
        "mps": mps.load(setup, MPS_SIZES),
    }


@pytest.fixture(scope="module")
def by_precision(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Reward]]:
    folder = tmp_path_factory.mktemp("twins")
    return {amp: every_reward(folder / str(amp), "cpu", amp=amp) for amp in (False, True)}


@pytest.mark.parametrize("name", NEAR)
def test_a_batch_scores_as_its_images_one_by_one_and_half_precision_stays_near(
    name: str, by_precision: dict[bool, dict[str, Reward]]
) -> None:
    reward, given = by_precision[False][name], images(4, 50, 33)
    together = score(reward, given, PROMPTS)
    alone = [score(reward, given[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    halved = score(by_precision[True][name], given, PROMPTS)
    assert halved.dtype == torch.float32
    assert 0 < (halved - together).abs().max() < NEAR[name]
    assert has_gradient(reward)


@pytest.mark.parametrize("amp", [False, True])
def test_on_a_gpu_no_devices_are_mixed_and_a_batch_waits_for_two_checks(
    amp: bool, tmp_path: Path
) -> None:
    with pretend_gpu() as seen:
        for name, reward in every_reward(tmp_path, "cuda", amp=amp).items():
            batch = images(4, 50, 33).to("cuda")
            score(reward, batch, PROMPTS)  # its texts are encoded once
            before = sum(seen.waits.values())
            assert score(reward, batch, PROMPTS).device.type == "cuda"
            own = 2 + (name == "imagereward")  # transformers looks at its mask
            assert sum(seen.waits.values()) - before == own


# --- sums and batches -------------------------------------------------------------------------


def test_every_image_is_scored_under_its_prompt_in_any_batch() -> None:
    given, prompts = images(7), [f"prompt {i}" for i in range(7)]
    rewards: dict[str, Reward] = {"bright": brightness, "digit": last_digit}
    for batch in (1, 3, 100):
        scores = score_all(rewards, given, prompts, batch=batch)
        assert torch.allclose(scores["bright"], given.mean((1, 2, 3)))
        assert scores["digit"].tolist() == list(range(7))
        assert score_all(rewards, given[:0], [], batch=batch)["bright"].shape == (0,)
    with pytest.raises(ValueError, match="7 images need as many prompts, not 6"):
        score_all(rewards, given, prompts[:6])


def test_a_sum_is_a_mean_in_a_common_range_with_its_parts_and_shares_what_it_can() -> None:
    values = {"pickscore": 20.8, "imagereward": -1.5}
    constant = {n: lambda b, _, v=v: torch.full((len(b),), v) for n, v in values.items()}
    both = WeightedSum(constant, {"pickscore": 1.0, "imagereward": 3.0}, SCALES)
    expected = (20.8 / 26 - 3 * 1.5 / 10) / 4
    assert both(images(), PROMPTS).tolist() == pytest.approx([expected] * 4)
    calls: list[int] = []

    def counted(batch: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(batch))
        return brightness(batch, prompts)

    parts: dict[str, Reward] = {"bright": counted, "digit": last_digit}
    weighted = WeightedSum(parts, {"bright": 1.0, "digit": 3.0}, {"digit": 0.1})
    rewards: dict[str, Reward] = {"multi": weighted, "bright": counted}
    scores = score_all(rewards, images(), ["1", "2", "3", "4"])
    assert calls == [4]
    assert list(names_of(rewards)) == ["multi", "bright", "digit"]
    assert set(scores) == {"multi", "bright", "digit"}
    assert torch.allclose(scores["multi"], (scores["bright"] + 0.3 * scores["digit"]) / 4)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clp", "did you mean clip"),
        ("multi:clp=1", "did you mean clip"),
        ("multi:clip=-1", "weight '-1'"),
        ("multi:clip", "weight 'clip'"),
        ("multi:clip=x", "weight 'x'"),
        ("multi:clip=0", "a weight above zero"),
        ("multi:clip=1,clip=2", "each reward once"),
        ("no_such_module:f", "cannot be imported"),
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:SCALES", "is no function"),
        (f"{__name__}:with_nan", r"must take \(images, prompts\)"),
    ],
)
def test_a_wrong_name_is_refused_in_a_line(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_reward(name)
    assert "\n" not in str(error.value)


def test_a_function_of_your_own_is_a_reward() -> None:
    name = f"{__name__}:brightness"
    sums = f"multi:{name}=2"
    assert parse(f"multi:hps=2,clip=0,{name}=0.5") == {"hps": 2, name: 0.5}
    assert set(parse("multi")) == set(SCALES)
    rewards = load_rewards([name, sums])
    expected = brightness(images(), PROMPTS)
    assert torch.equal(score(rewards[name], images(), PROMPTS), expected)
    assert torch.allclose(score(rewards[sums], images(), PROMPTS), expected)


def test_what_looks_may_fail_in_any_way_but_hears_a_signal() -> None:
    class Odd(Exception):
        """As the libraries of services have."""

    for error in (Odd("away"), EOFError("cut")):
        said = r"mine fails on float32 \[1, 2\]: \w+: \w+"
        with pytest.raises(ValueError, match=said), looking("mine", torch.zeros(1, 2)):
            raise error
    for error in (Stopped(), ValueError("as it is"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)) as raised, looking("mine", torch.zeros(1, 2)):
            raise error
        assert raised.value is error
