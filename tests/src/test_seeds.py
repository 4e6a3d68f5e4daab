"""Lists of seeds, and noise that hangs on a seed alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.seeds import MAX_SEED, generator, parse_seeds, randint, randn


def test_ranges_and_numbers_keep_their_order() -> None:
    assert parse_seeds("3-5, 100,0 - 1") == [3, 4, 5, 100, 0, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("1,,2", "''"),
        ("5-1", "'5-1' falls: write '1-5'"),
        ("0-63,63", "seed 63 of '63' is there twice"),
        ("7,3-9", "seed 7 of '3-9' is there twice"),
        ("1;2", "'1;2'"),
        ("٣", "'٣'"),
        ("9223372036854775808", "2^63 - 1"),
        ("0-99999999999", "more than 10000000"),
        ("z" * 5000, "no seed"),
    ],
)
def test_a_bad_list_names_the_part_in_one_short_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="seed") as caught:
        parse_seeds(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 200


@given(st.lists(st.integers(0, MAX_SEED), min_size=1, unique=True))
def test_any_list_of_seeds_survives_being_written(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == seeds


def test_noise_hangs_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    together = randn([5, 7, 2**40], (3, 8, 8))
    assert torch.equal(together[1:2], randn([7], (3, 8, 8)))
    assert torch.equal(together[2:], randn([2**40], (3, 8, 8)))
    drawn = randint(range(200), 10, stream="class")
    assert drawn[17] == randint([17], 10, stream="class")[0]
    assert set(drawn.tolist()) == set(range(10))
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_stream_is_torchs_and_the_others_are_apart_on_every_machine_and_day() -> None:
    expected = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(11))
    assert torch.equal(randn([11], (3, 8, 8))[0], expected)
    draws = [generator(s, t) for s in (0, 1, 2**32, 2**63 - 1) for t in (0, 1, "1", "churn/0")]
    assert len({float(torch.rand((), generator=g)) for g in draws}) == len(draws)
    assert generator(3, "churn/0").initial_seed() == 3505850784
