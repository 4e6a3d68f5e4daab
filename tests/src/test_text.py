"""Lists of prompts, and which seed meets which."""

from pathlib import Path

import pytest

from src.text import meet, read_prompts


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a red fox\n\n  two birds  \n", encoding="utf-8")
    assert read_prompts(path) == ("a red fox", "two birds")


def test_a_csv_file_has_them_in_the_column_text(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('id,text\n1,"a fox, red"\n2,"two\nbirds"\n3,\n', encoding="utf-8-sig")
    assert read_prompts(path) == ("a fox, red", "two\nbirds")


def test_lines_end_as_on_any_system_and_nowhere_else(tmp_path: Path) -> None:
    content = "a\u2028b\x0bc\x85\r\nd\re\nf".encode()
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == ("a\u2028b\x0bc", "d", "e", "f")
    (tmp_path / "p.csv").write_bytes(b"text\r" + content)
    assert read_prompts(tmp_path / "p.csv") == ("a\u2028b\x0bc", "d", "e", "f")


def test_an_only_column_needs_no_quotes_around_commas(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('text\na red fox, in the snow, oil painting\n"a cat, sleeping"\n')
    assert read_prompts(path) == ("a red fox, in the snow, oil painting", "a cat, sleeping")


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
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_prompts_are_repeated_in_order() -> None:
    assert meet([4, 5, 9, 7], ["a", "b"]) == [(4, "a"), (5, "b"), (9, "a"), (7, "b")]
    assert meet([4, 5], ["a"]) == [(4, "a"), (5, "a")]
    with pytest.raises(ValueError, match=r"3 prompts need as many seeds, not 2.*--seeds 0-2"):
        meet([0, 1], ["a", "b", "c"])
