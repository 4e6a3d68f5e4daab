"""Lists of prompts, and which seed meets which."""

from pathlib import Path

import pytest

from src.text import aligned, meet, read_prompts

ODD = "a\u2028b\x0bc\x85\r\nd\re\nf".encode()


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", b"a red fox\n\n  two birds  \n", ("a red fox", "two birds")),
        (
            "p.csv",
            '\ufeffid,text\n1,"a fox, red"\n2,"two\nbirds"\n3,\n'.encode(),
            ("a fox, red", "two\nbirds"),
        ),
        ("p.txt", ODD, ("a\u2028b\x0bc", "d", "e", "f")),  # no separator of Unicode ends a line
        ("p.csv", b"text\r" + ODD, ("a\u2028b\x0bc", "d", "e", "f")),
        ("p.csv", b'text\na fox, in snow\n"a cat, asleep"\n', ("a fox, in snow", "a cat, asleep")),
    ],
)
def test_prompts_are_a_line_each_or_the_column_text(
    name: str, content: bytes, prompts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", b"text,id\na dog,2\na fox, red,1\n", "line 3: 3 cells for 2 columns"),
        ("p.csv", b"id,prompt\n1,a\n", "no column 'text'"),
        ("p.csv", b"", "no column 'text'"),
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.json", b"[]", "ends in .txt or .csv"),
        ("p.csv", b'text\n"a', "not CSV"),
    ],
)
def test_other_files_are_refused_in_a_line(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
        read_prompts(tmp_path / name)


def test_prompts_are_repeated_in_order() -> None:
    assert meet([4, 5, 9, 7], ["a", "b"]) == [(4, "a"), (5, "b"), (9, "a"), (7, "b")]
    assert meet([4, 5], ["a"]) == [(4, "a"), (5, "a")]
    with pytest.raises(ValueError, match=r"3 prompts need as many seeds, not 2.*--seeds 0-2"):
        meet([0, 1], ["a", "b", "c"])


def test_columns_of_a_table_begin_alike_or_end_alike() -> None:
    rows = [("name", "calls", "what"), ("a", "10", "long text"), ("bcdef", "3", "b")]
    assert aligned(rows).splitlines() == [
        "name   calls       what",
        "-----------------------",
        "a         10  long text",
        "bcdef      3          b",
    ]
    assert aligned(rows, (0, 2), rule=False).splitlines()[1:] == [
        "a         10  long text",
        "bcdef      3  b",
    ]
