"""Images scored by rewards: one folder with its means, or two against each other.

    python -m eval.score samples --reward hps --reward clip
    python -m eval.score samples/epd samples/ddim --reward pickscore
    torchrun --nproc_per_node=2 -m eval.score samples --reward multi

The prompts are those that sample.py wrote into samples.json and the pictures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from eval.features import stamped
from eval.gather import on_first
from eval.machine import provenance
from eval.pictures import Pictures, find_pictures
from eval.scores import Scored, Task, open_scores, prompts_for, score_pictures, write_csv
from rewards.registry import Setup, files_of, load_rewards
from rewards.scorer import names_of
from src import ranks
from src.files import write_json
from src.intervals import Estimate, mean_of, win_rate
from src.options import Device, OneLineCommand, one_line_errors
from src.text import read_prompts

Row = tuple[str, ...]


def summary(scored: Sequence[Scored], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each reward the mean with its 95 % interval, the spread and the ends."""
    return {name: described(column(scored, name)) for name in names}


def described(values: Tensor) -> dict[str, float]:
    """What is said of scores [N]."""
    spread = values.std(correction=1 if len(values) > 1 else 0).item()
    ends = {"min": values.min().item(), "max": values.max().item()}
    return {**named(mean_of(values)), "std": spread, **ends}


def named(estimate: Estimate) -> dict[str, float]:
    """A mean and its interval by their names."""
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def column(scored: Sequence[Scored], name: str) -> Tensor:
    """The scores [N] of a reward."""
    return torch.tensor([one.scores[name] for one in scored], dtype=torch.float64)


def pairs(first: Sequence[Scored], second: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """The pictures of one seed (else of one name) and prompt in both.

    ValueError where there are none, and where one place has two of them.
    """

    def by_key(scored: Sequence[Scored]) -> dict[tuple[str, str], Scored]:
        found: dict[tuple[str, str], Scored] = {}
        for one in scored:
            name = one.name if one.seed is None else f"seed {one.seed}"
            if (other := found.setdefault((name, one.prompt), one)) is not one:
                raise ValueError(f"{other.name} and {one.name} have one seed and prompt")
        return found

    mine, theirs = by_key(first), by_key(second)
    both = [(one, theirs[key]) for key, one in mine.items() if key in theirs]
    if not both:
        raise ValueError("the two have no picture of one seed and prompt: nothing to compare")
    return both


def versus(
    both: Sequence[tuple[Scored, Scored]], names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of each reward both means, the second's lead over the first, and how often it wins."""
    found = {}
    for name in names:
        a, b = (column([pair[side] for pair in both], name) for side in (0, 1))
        found[name] = {
            "first": named(mean_of(a)),
            "second": named(mean_of(b)),
            "difference": named(mean_of(b - a)),
            "win_rate": named(win_rate(b - a)),
        }
    return found


def interval(numbers: Mapping[str, float], digits: int = 4) -> str:
    """`0.2731 [0.2712, 0.2749]`."""
    mean, low, high = (f"{numbers[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(head: Row, rows: Sequence[Row]) -> str:
    """Columns under their heads."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    padded = (
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return "\n".join(padded)


def settings_of(names: Sequence[str], setup: Setup) -> dict[str, Any]:
    """What scores depend on besides the pictures."""
    files = files_of(names, setup.paths)
    return {"amp": setup.amp, **{f"weights of {n}": stamped(p) for n, p in files.items()}}


class NamedPath(click.ParamType):
    """`NAME=PATH` -> (name, path)."""

    name = "name=path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not (name and equals and path):
            self.fail(f"'{value}' should be such as clip=weights/clip", param)
        return name, path


def scores_folder(pictures: Pictures, outdir: Path | None, at: int, of: int) -> Path:
    """Where the scores of a place go: beside its pictures, or into `outdir`."""
    if outdir:
        return outdir / f"{at + 1}-{pictures.place.stem}" if of > 1 else outdir
    place = pictures.place
    return place / "scores" if place.is_dir() else place.with_name(f"{place.stem}-scores")


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.argument("places", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reward", "names", multiple=True, required=True, help="Repeatable: hps, multi, ..."
)
@click.option("--prompt", multiple=True, help="One for all images, or one an image.")
@click.option("--prompt-file", "--prompt_file", help=".txt, one a line, or .csv (text).")
@click.option(
    "--weights", type=NamedPath(), multiple=True, help="Where else they are; repeatable."
)
@click.option("--batch", type=click.IntRange(1), default=32, help="Images at once, a process.")
@click.option("--amp", is_flag=True, help="Half precision in the networks.")
@click.option("--skip-bad", "--skip_bad", is_flag=True, help="Leave out, count and list.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: scores in each folder.")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(  # noqa: PLR0913 - one parameter an option
    places: tuple[Path, ...],
    names: tuple[str, ...],
    prompt: tuple[str, ...],
    prompt_file: str | None,
    weights: tuple[tuple[str, str], ...],
    batch: int,
    amp: bool,
    skip_bad: bool,
    outdir: Path | None,
    device: torch.device,
) -> None:
    """Score a folder, a zip or a samples.json; of two, also tell which is better, pair by pair.

    Writes scores.csv and summary.json, and versus.json for two. What was scored before is kept.

    \b
    python -m eval.score samples/sd15/epd_nfe5 --reward hps --reward imagereward
    python -m eval.score samples/a samples/b --reward multi:hps=1,clip=0.5 --skip-bad
    """  # noqa: D301
    if len(places) > 2:
        raise ValueError(f"{len(places)} places: give one, or two to compare")
    if prompt and prompt_file:
        raise ValueError("--prompt and --prompt-file are given: choose one of them")
    given = read_prompts(prompt_file) if prompt_file else prompt
    found = [find_pictures(place) for place in places]
    prompts = [prompts_for(pictures, given) for pictures in found]
    setup = Setup(ranks.init(device), amp, dict(weights))
    settings = settings_of(names, setup)
    rewards = load_rewards(names, setup)
    scored = []
    for at, pictures in enumerate(found):
        task = Task(pictures, prompts[at], rewards, setup.device, batch, skip_bad)
        folder = scores_folder(pictures, outdir, at, len(found))
        scored.append(score_place(task, folder, settings))
    if len(scored) == 2:
        folder = outdir or scores_folder(found[0], None, 0, 2)
        on_first(lambda: compare(places, scored, names_of(rewards), folder))
    ranks.close()


def score_place(task: Task, folder: Path, settings: Mapping[str, Any]) -> list[Scored]:
    """The scores of a place, written and printed."""
    on_first(lambda: open_scores(folder, settings))
    scored, left_out = score_pictures(task, folder)
    names = names_of(task.rewards)

    def report() -> None:
        numbers = summary(scored, names)
        about = {"place": str(task.pictures.place), "count": len(scored), "left_out": left_out}
        write_csv(folder / "scores.csv", scored, names)
        write_json(
            folder / "summary.json",
            {**about, "rewards": numbers, "settings": settings, **provenance(task.device)},
        )
        click.echo(f"{len(scored)} images of {task.pictures.place}; all in {folder}")
        rows = [(n, interval(v), f"{v['std']:.4f}") for n, v in numbers.items()]
        click.echo(table(("reward", "mean [95 %]", "spread"), rows))
        if left_out:
            click.echo(f"{len(left_out)} images left out:", err=True)
        for name, why in left_out.items():
            click.echo(f"  {name}: {why}", err=True)

    on_first(report)
    return scored


def compare(
    places: Sequence[Path], scored: Sequence[Sequence[Scored]], names: Sequence[str], folder: Path
) -> None:
    """The pairs of two places, written and printed."""
    both = pairs(scored[0], scored[1])
    numbers = versus(both, names)
    about = {"first": str(places[0]), "second": str(places[1]), "pairs": len(both)}
    unpaired = [len(one) - len(both) for one in scored]
    write_json(folder / "versus.json", {**about, "unpaired": unpaired, "rewards": numbers})
    click.echo(f"{len(both)} pairs of one seed and prompt, {sum(unpaired)} images without")
    head = ("reward", "second - first [95 %]", "second wins [95 %]")
    rows = [(n, interval(v["difference"]), interval(v["win_rate"], 3)) for n, v in numbers.items()]
    click.echo(table(head, rows))


if __name__ == "__main__":
    main()
