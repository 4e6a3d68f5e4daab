"""Images scored by rewards: one folder with its means, or two against each other.

    python -m eval.score samples --reward hps --reward clip
    python -m eval.score samples/epd samples/ddim --reward pickscore
    torchrun --nproc_per_node=2 -m eval.score samples --reward multi

The prompts are those that the pictures say. A score is kept under all that it depends on: the
picture's content, the prompt, and the reward's code, weights and precision.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from eval.machine import provenance
from eval.pictures import Identity, Pictures, find_pictures, identities, read_batches
from rewards.base import Reward, WeightedSum
from rewards.fingerprint import fingerprint
from rewards.registry import ADAPTERS, Setup, load_rewards, singles
from rewards.scorer import names_of, score_all
from src import ranks
from src.files import append_jsonl, read_jsonl, write_json, write_text
from src.options import Device, OneLineCommand
from src.stats import Estimate, aligned, mean_of, win_rate
from src.text import read_prompts

CACHE = "cache-{}.jsonl"
BY_CLASS = ("fashion-judge",)  # rewards that take the number of a class for a prompt


@dataclass(frozen=True)
class ScoredPicture:
    """A picture with its scores, each in its reward's own units."""

    name: str
    seed: int | None
    prompt: str
    scores: dict[str, float]
    digest: str = ""  # of the file


@dataclass(frozen=True)
class Scoring:
    """What is to be scored, and how."""

    pictures: Pictures
    prompts: tuple[str, ...] | None  # one a picture; None: what the pictures say
    rewards: Mapping[str, Reward]
    keys: Mapping[str, str]  # what the scores of each single reward are kept under
    device: torch.device
    batch: int = 32
    skip_bad: bool = False
    by_prompt: bool = True  # whether some reward looks at the prompt
    by_class: bool = False  # whether all of them understand the number of a class


def prompts_for(pictures: Pictures, given: tuple[str, ...]) -> tuple[str, ...] | None:
    """One prompt a picture, in the order of the pictures; None where none is given.

    One serves all. ValueError for any other number.
    """
    count = len(pictures.items)
    if len(given) not in (0, 1, count):
        raise ValueError(
            f"{count} images in {pictures.place} need as many prompts, or one, not {len(given)}"
        )
    return (given * count if len(given) == 1 else given) or None


def score_pictures(task: Scoring, folder: Path) -> tuple[list[ScoredPicture], dict[str, str]]:
    """All scores, on every rank, and why pictures were left out, by their names.

    Scores that the folder has already are kept; new ones are added batch by batch. Raises
    ValueError, on every rank, for a picture that cannot be read (unless the task skips it) or
    has no prompt, and for a reward that breaks.
    """
    items, bad = items_of(task)
    cache = read_cache(folder)
    ranks.barrier()  # all have read before the first writes
    done: dict[int, dict[str, float]] = {}
    for at, item in items.items():
        there = cache.get((item.digest, item.prompt), {})
        if there.keys() >= set(task.keys.values()):
            done[at] = {name: there[key] for name, key in task.keys.items()}
    missing = ranks.share([at for at in items if at not in done])
    failed = ""
    try:
        for at, scores in score_missing(task, items, missing, bad):
            keyed = {task.keys[name]: value for name, value in scores.items()}
            line = {"picture": items[at].digest, "prompt": items[at].prompt, "scores": keyed}
            append_jsonl(folder / CACHE.format(ranks.rank()), line)
            done[at] = scores
    except ValueError as error:
        failed = str(error)
    ranks.raise_together(failed)
    shares = ranks.gather_objects((done, bad))
    left_out = {name: why for _, reasons in shares for name, why in reasons.items()}
    everything = {at: scores for share, _ in shares for at, scores in share.items()}
    if not everything:
        why = next(iter(left_out.values()), "")
        raise ValueError(f"no image in {task.pictures.place} could be scored: {why}")
    for at, scores in everything.items():
        items[at].scores.update(with_sums(task.rewards, scores))
    return [item for item in items.values() if item.scores], left_out


def items_of(task: Scoring) -> tuple[dict[int, ScoredPicture], dict[str, str]]:
    """The pictures by their places, not yet scored, and why some cannot be read, by name.

    Raises ValueError for these, unless they are skipped, and for a picture whose prompt nobody
    tells though some reward looks at it.
    """
    items: dict[int, ScoredPicture] = {}
    bad: dict[str, str] = {}
    mine = identities(task.pictures, ranks.share(range(len(task.pictures.items))))
    pairs = [pair for share in ranks.gather_objects(mine) for pair in share.items()]
    disagreeing = 0
    for at, one in sorted(pairs, key=lambda pair: pair[0]):
        name = task.pictures.items[at].name
        if not isinstance(one, Identity):
            bad[name] = one
            continue
        prompt = task.prompts[at] if task.prompts else one.prompt
        if prompt is None or (isinstance(prompt, int) and not task.by_class):
            if task.by_prompt:
                raise ValueError(f"{name} does not say its prompt: give --prompt or --prompt-file")
            prompt = ""
        items[at] = ScoredPicture(name, one.seed, str(prompt), {}, one.digest)
        disagreeing += one.disagrees
    if bad and not task.skip_bad:
        raise ValueError(f"{next(iter(bad.values()))} (--skip-bad leaves such images out)")
    if disagreeing and ranks.is_first():
        said = "another seed or prompt than they carry themselves, which are believed"
        click.echo(f"samples.json gives {disagreeing} of {len(items)} images {said}", err=True)
    return items, bad


def read_cache(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The scores that earlier runs wrote, by picture and prompt; ValueError for another file."""
    cache: dict[tuple[str, str], dict[str, float]] = {}
    for path in sorted(folder.glob(CACHE.format("*"))):
        for line in read_jsonl(path):
            if not isinstance(line, dict) or not line.keys() >= {"picture", "prompt", "scores"}:
                raise ValueError(f"{path} holds a line that is no score: delete the file")
            cache.setdefault((line["picture"], line["prompt"]), {}).update(line["scores"])
    return cache


def score_missing(
    task: Scoring, items: Mapping[int, ScoredPicture], missing: Sequence[int], bad: dict[str, str]
) -> Iterator[tuple[int, dict[str, float]]]:
    """The scores by the single rewards of the pictures `missing`, a batch after the other."""
    skipped = bad if task.skip_bad else None
    with ranks.progress(len(missing), "image") as bar:
        for alike in read_batches(task.pictures, missing, batch=task.batch, bad=skipped):
            images = alike.images.to(task.device).float() / 255
            pictures = [items[at] for at in alike.which]
            for picture, row in score_images(task, pictures, images, bad):
                yield alike.which[pictures.index(picture)], row
            bar.update(len(images))


def score_images(
    task: Scoring, pictures: Sequence[ScoredPicture], images: Tensor, bad: dict[str, str]
) -> Iterator[tuple[ScoredPicture, dict[str, float]]]:
    """The scores of images of one size; those that have none go into `bad`, one by one.

    ValueError instead, with the first and the last image, where the task does not skip them.
    """
    rewards: dict[str, Reward] = {}
    for name, reward in task.rewards.items():
        rewards |= reward.rewards if isinstance(reward, WeightedSum) else {name: reward}
    try:
        scores = score_all(rewards, images, [one.prompt for one in pictures], batch=task.batch)
    except ValueError as error:
        if not task.skip_bad:
            where = f"images {pictures[0].name} to {pictures[-1].name}"
            raise ValueError(f"{error} ({where})") from error
        if len(pictures) == 1:
            bad[pictures[0].name] = str(error)
        else:
            for at, picture in enumerate(pictures):
                yield from score_images(task, [picture], images[at : at + 1], bad)
        return
    for picture, row in zip(pictures, torch.stack([*scores.values()], 1).tolist(), strict=True):
        yield picture, dict(zip(scores, row, strict=True))


def with_sums(rewards: Mapping[str, Reward], scores: dict[str, float]) -> dict[str, float]:
    """The scores of a picture by single rewards, with those of the weighted sums."""
    parts = {name: torch.tensor([value]) for name, value in scores.items()}
    sums = {n: r.mean(parts).item() for n, r in rewards.items() if isinstance(r, WeightedSum)}
    return scores | sums


def described(values: Tensor) -> dict[str, float]:
    """What is said of scores [N]: the mean with its 95 % interval, the spread and the ends."""
    spread = values.std(correction=1 if len(values) > 1 else 0).item()
    ends = {"min": values.min().item(), "max": values.max().item()}
    return {**named(mean_of(values)), "std": spread, **ends}


def named(estimate: Estimate) -> dict[str, float]:
    """A mean and its interval by their names."""
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def column(scored: Sequence[ScoredPicture], name: str) -> Tensor:
    """The scores [N] of a reward."""
    return torch.tensor([one.scores[name] for one in scored], dtype=torch.float64)


def pairs(
    first: Sequence[ScoredPicture], second: Sequence[ScoredPicture]
) -> list[tuple[ScoredPicture, ScoredPicture]]:
    """The pictures of one seed (else of one name) and prompt in both.

    ValueError where there are none, and where one place has two of them.
    """
    sides: list[dict[tuple[str, str], ScoredPicture]] = [{}, {}]
    for side, scored in zip(sides, (first, second), strict=True):
        for one in scored:
            key = (one.name if one.seed is None else f"seed {one.seed}", one.prompt)
            if (other := side.setdefault(key, one)) is not one:
                raise ValueError(f"{other.name} and {one.name} have one seed and prompt")
    both = [(one, sides[1][key]) for key, one in sides[0].items() if key in sides[1]]
    if not both:
        raise ValueError("the two have no picture of one seed and prompt: nothing to compare")
    return both


def versus(
    both: Sequence[tuple[ScoredPicture, ScoredPicture]], names: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """Of each reward both means, the second's lead over the first, and how often it wins."""
    numbers = {}
    for name in names:
        a, b = (column([pair[side] for pair in both], name) for side in (0, 1))
        numbers[name] = {
            "first": mean_of(a),
            "second": mean_of(b),
            "difference": mean_of(b - a),
            "win_rate": win_rate(b - a),
        }
    return numbers


def reads_texts(names: Sequence[str]) -> list[str]:
    """Those of the single rewards in these that judge by a text, and not by a class as well."""
    texts = (n for n in singles(names) if n in ADAPTERS and ADAPTERS[n].by_prompt)
    return [name for name in texts if name not in BY_CLASS]


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
@click.argument("places", nargs=-1, type=click.Path(path_type=Path))
@click.option("--images", multiple=True, type=click.Path(path_type=Path), help="More places.")
@click.option("--pattern", default="*", help="Of file names: '*.png'.")
@click.option("--reward", multiple=True, required=True, help="Repeatable: hps, multi, ...")
@click.option("--prompt", multiple=True, help="One for all images, or one an image.")
@click.option("--prompt-file", "--prompt_file", "--prompts", help=".txt, or .csv (text).")
@click.option(
    "--weights", type=NamedPath(), multiple=True, help="Where else they are; repeatable."
)
@click.option("--batch", type=click.IntRange(1), default=32, help="Images at once, a process.")
@click.option("--amp", is_flag=True, help="Half precision in the networks.")
@click.option("--skip-bad", "--skip_bad", is_flag=True, help="Leave out, count and list.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: scores in each folder.")
@click.option("--output-json", "--output_json", type=click.Path(path_type=Path), help="All, too.")
@click.option("--device", type=Device(), default="auto")
def main(**options: Any) -> None:
    """Score a folder, a zip or a samples.json; of two, also tell which is better, pair by pair.

    Writes scores.csv and summary.json, and versus.json for two. What was scored before is kept.

    \b
    python -m eval.score samples/sd15/epd_nfe5 --reward hps --reward imagereward
    python -m eval.score samples/a samples/b --reward multi:hps=1,clip=0.5 --skip-bad
    """  # noqa: D301
    places, names = (*options["places"], *options["images"]), options["reward"]
    if not 0 < len(places) <= 2:
        raise ValueError(f"{len(places)} places: give one, or two to compare")
    if options["prompt"] and options["prompt_file"]:
        raise ValueError("--prompt and --prompt-file are given: choose one of them")
    file = options["prompt_file"]
    texts = read_prompts(file) if file else options["prompt"]
    found = [find_pictures(place, options["pattern"]) for place in places]
    prompts = [prompts_for(pictures, texts) for pictures in found]
    setup = Setup(ranks.init(options["device"]), options["amp"], dict(options["weights"]))
    rewards = load_rewards(names, setup)
    keys = {name: f"{name} {fingerprint(name, setup)}" for name in singles(names)}
    by_prompt = any(n not in ADAPTERS or ADAPTERS[n].by_prompt for n in keys)
    how = (options["batch"], options["skip_bad"], by_prompt, not reads_texts(names))
    scored: list[list[ScoredPicture]] = []
    for at, pictures in enumerate(found):
        task = Scoring(pictures, prompts[at], rewards, keys, setup.device, *how)
        folder = scores_folder(pictures, options["outdir"], at, len(found))
        rows, left_out = score_pictures(task, folder)
        write = partial(report, task, folder, rows, left_out, setup, options["output_json"])
        ranks.on_first(write)
        scored.append(rows)
    if len(scored) == 2:
        folder = options["outdir"] or scores_folder(found[0], None, 0, 2)
        ranks.on_first(partial(compare, places, scored, names_of(rewards), folder))
    ranks.close()


def report(
    task: Scoring,
    folder: Path,
    scored: Sequence[ScoredPicture],
    left_out: dict[str, str],
    setup: Setup,
    output_json: Path | None,
) -> None:
    """The scores of a place, written and printed."""
    names, place = names_of(task.rewards), task.pictures.place
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "seed", "prompt", *names])
    for one in scored:
        seed = "" if one.seed is None else one.seed
        writer.writerow([one.name, seed, one.prompt, *(repr(one.scores[n]) for n in names)])
    write_text(folder / "scores.csv", text.getvalue())
    numbers = {name: described(column(scored, name)) for name in names}
    settings = {"amp": setup.amp, **{f"weights of {n}": str(p) for n, p in setup.paths.items()}}
    about = {"place": str(place), "count": len(scored), "left_out": left_out}
    about |= {"rewards": numbers, "settings": settings, "fingerprints": list(task.keys.values())}
    write_json(folder / "summary.json", {**about, **provenance(task.device)})
    if output_json:
        images = [{"file": one.name, "prompt": one.prompt, **one.scores} for one in scored]
        write_json(output_json, {"rewards": numbers, "images": images})
    click.echo(f"{len(scored)} images of {place}; all in {folder}")
    rows = [(n, str(mean_of(column(scored, n))), f"{v['std']:.4f}") for n, v in numbers.items()]
    click.echo(aligned([("reward", "mean [95 %]", "spread"), *rows]))
    if left_out:
        click.echo(f"{len(left_out)} images left out:", err=True)
    for name, why in left_out.items():
        click.echo(f"  {name}: {why}", err=True)


def compare(
    places: Sequence[Path],
    scored: Sequence[Sequence[ScoredPicture]],
    names: Sequence[str],
    folder: Path,
) -> None:
    """The pairs of two places, written and printed."""
    both = pairs(scored[0], scored[1])
    numbers = versus(both, names)
    about = {"first": str(places[0]), "second": str(places[1]), "pairs": len(both)}
    unpaired = [len(one) - len(both) for one in scored]
    plain = {n: {what: named(e) for what, e in of.items()} for n, of in numbers.items()}
    write_json(folder / "versus.json", {**about, "unpaired": unpaired, "rewards": plain})
    click.echo(f"{len(both)} pairs of one seed and prompt, {sum(unpaired)} images without")
    rows = [(n, str(v["difference"]), str(v["win_rate"])) for n, v in numbers.items()]
    click.echo(aligned([("reward", "second - first [95 %]", "second wins [95 %]"), *rows]))


if __name__ == "__main__":
    main()
