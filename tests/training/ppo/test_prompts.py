from training.ppo.prompts import fixed_jobs, noise_seed, prompt_at, shots

NAMES = tuple("abcde")


def seeds(grouping: str, step: int = 0) -> list[list[int]]:
    made = shots(NAMES, 1, step, count=8, k=4, grouping=grouping)
    return [[shot.job.seed for shot in made[i : i + 4]] for i in (0, 4)]


def test_every_round_of_the_stream_has_every_prompt_once_in_another_order() -> None:
    rounds = [[prompt_at(NAMES, 7, 5 * i + j) for j in range(5)] for i in range(4)]
    assert all(sorted(map(str, names)) == list(NAMES) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_the_stream_depends_on_the_seed() -> None:
    first, other = ([prompt_at(NAMES, s, j) for j in range(30)] for s in (0, 1))
    assert first != other


def test_steps_take_the_stream_up_where_the_last_one_left_it() -> None:
    found = [
        shot.job.prompt
        for step in range(5)
        for shot in shots(NAMES, 2, step, count=4, k=2, grouping="crn")[::2]
    ]
    assert found == [prompt_at(NAMES, 2, i) for i in range(10)]


def test_a_group_of_common_random_numbers_has_one_prompt_and_one_noise() -> None:
    first, second = seeds("crn")
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_other_groupings_give_every_image_its_own_noise() -> None:
    for grouping in ("prompt", "mixed"):
        first, second = seeds(grouping)
        assert len({*first, *second}) == 8


def test_every_table_has_a_generator_of_its_own() -> None:
    streams = [
        shot.stream
        for step in range(3)
        for shot in shots(NAMES, 1, step, count=8, k=4, grouping="crn")
    ]
    assert len(set(streams)) == 24


def test_held_out_noise_is_fixed_and_apart_from_that_of_training() -> None:
    jobs = fixed_jobs(NAMES, 3, 8)
    assert jobs == fixed_jobs(NAMES, 3, 9)[:8]
    assert [job.prompt for job in jobs] == ["a", "b", "c", "d", "e", "a", "b", "c"]
    trained = {noise_seed(3, f"{position}") for position in range(100)}
    assert len({job.seed for job in jobs} - trained) == 8
