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
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import click
import torch
from torch import Tensor

from eval.machine import provenance
from eval.pictures import Identity, Picture, Pictures, find_pictures, identities, read_batches
from rewards.base import Reward, WeightedSum
from rewards.fingerprint import fingerprint
from rewards.registry import ADAPTERS, Setup, files_of, load_rewards, reads_texts, singles
from rewards.scorer import names_of, score_all, single_rewards
from src import ranks
from src.files import append_jsonl, check_writable, read_jsonl, write_json, write_text
from src.options import Device, NamedPath, OneLineCommand
from src.stats import Estimate, mean_of, win_rate
from src.text import aligned, chosen_prompts

CACHE = "cache-{}.jsonl"
HINT = " (--skip-bad leaves such images out)"


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
    if options["output_json"] and len(places) == 2:
        raise ValueError("--output-json is of one place: of two each has its summary.json")
    texts = chosen_prompts(options["prompt"], options["prompt_file"], None)
    paths = dict(options["weights"])
    used = files_of(names, paths)
    if spare := [name for name in paths if name not in used]:
        raise ValueError(f"--weights {spare[0]}={paths[spare[0]]}: nothing here reads them")
    sets, folders = zip(*sets_of(places, texts, options), strict=True)
    setup = Setup(ranks.init(options["device"]), options["amp"], paths)
    rewards = load_rewards(names, setup)
    keys = {name: f"{name} {fingerprint(name, setup)}" for name in singles(names)}
    by_prompt = any(n not in ADAPTERS or ADAPTERS[n].by_prompt for n in keys)
    tasks = [
        Scoring(
            pictures,
            texts * len(pictures.items) if len(texts) == 1 else texts,
            rewards,
            keys,
            setup.device,
            options["batch"],
            options["skip_bad"],
            by_prompt,
            not reads_texts(names),
        )
        for pictures in sets
    ]
    unscored = [items_of(task) for task in tasks]
    if len(tasks) == 2:
        pairs(*([*items.values()] for items, _ in unscored))
    scored: list[list[ScoredPicture]] = []
    for task, (items, bad), folder in zip(tasks, unscored, folders, strict=True):
        rows, left_out = score_pictures(task, items, bad, folder)
        write = partial(write_scores, task, folder, rows, left_out, setup, options["output_json"])
        ranks.on_first(write)
        scored.append(rows)
    if len(scored) == 2:
        folder = options["outdir"] or scores_folder(sets[0].place)
        ranks.on_first(partial(write_versus, places, scored, names_of(rewards), folder))
    ranks.close()


def sets_of(
    places: Sequence[Path], texts: Sequence[str], options: Mapping[str, Any]
) -> list[tuple[Pictures, Path]]:
    """The pictures of each place, in the order of the texts, and the folder for their scores.

    ValueError for another number of pictures than texts, and where nothing can be written.
    """
    sets = []
    for number, place in enumerate(places, 1):
        pictures = find_pictures(place, options["pattern"])
        count, folder = len(pictures.items), options["outdir"] or scores_folder(pictures.place)
        if len(texts) not in (0, 1, count):
            where = f"{count} images in {pictures.place}"
            raise ValueError(f"{where} need as many prompts, or one, not {len(texts)}")
        if len(texts) > 1:
            pictures = replace(pictures, items=by_number(pictures.items))
        if options["outdir"] and len(places) == 2:
            folder /= f"{number}-{pictures.place.stem}"
        check_writable(folder / "scores.csv")
        sets.append((pictures, folder))
    if options["output_json"]:
        check_writable(options["output_json"])
    return sets


def by_number(items: Sequence[Picture]) -> tuple[Picture, ...]:
    """Pictures whose names are numbers by these, so that 2.png goes before 10.png; else as is.

    Folder by folder, as they stand.
    """
    paths = [PurePosixPath(picture.name) for picture in items]
    if not all(path.stem.isdecimal() for path in paths):
        return tuple(items)
    keys = [(path.parent, int(path.stem)) for path in paths]
    return tuple(p for _, p in sorted(zip(keys, items, strict=True), key=itemgetter(0)))


def scores_folder(place: Path) -> Path:
    """Where the scores of a place go: beside its pictures."""
    return place / "scores" if place.is_dir() else place.with_name(f"{place.stem}-scores")


# --- scoring --------------------------------------------------------------------------------


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
    prompts: Sequence[str]  # one a picture; empty: what the pictures say
    rewards: Mapping[str, Reward]
    keys: Mapping[str, str]  # what the scores of each single reward are kept under
    device: torch.device
    batch: int = 32
    skip_bad: bool = False
    by_prompt: bool = True  # whether some reward looks at the prompt
    by_class: bool = False  # whether all of them understand the number of a class


def score_pictures(
    task: Scoring, items: Mapping[int, ScoredPicture], bad: dict[str, str], folder: Path
) -> tuple[list[ScoredPicture], dict[str, str]]:
    """All scores of what items_of gave, on every rank, and why pictures were left out, by name.

    Scores that the folder has already are kept; new ones are added batch by batch. Raises
    ValueError, on every rank, for a picture that cannot be read and for a reward that breaks,
    unless the task skips them.
    """
    cache = read_cache(folder)
    ranks.barrier()  # all have read before the first writes
    done: dict[int, dict[str, float]] = {}
    for at, item in items.items():
        there = cache.get((item.digest, item.prompt), {})
        if there.keys() >= set(task.keys.values()):
            done[at] = {name: there[key] for name, key in task.keys.items()}
    missing = ranks.share([at for at in items if at not in done])
    skipped, path = bad if task.skip_bad else None, folder / CACHE.format(ranks.rank())
    how = {"batch": task.batch, "bad": skipped, "hint": HINT}
    with ranks.together(), ranks.progress(len(missing), "image") as bar:
        for alike in read_batches(task.pictures, missing, **how):
            images = alike.images.to(task.device).float() / 255
            for at, scores in score_images(task, items, alike.which, images, bad):
                keyed = {task.keys[name]: value for name, value in scores.items()}
                line = {"picture": items[at].digest, "prompt": items[at].prompt}
                append_jsonl(path, {**line, "scores": keyed})
                done[at] = scores
            bar.update(len(images))
    shares = ranks.of_each_rank((done, bad))
    left_out = {name: why for _, reasons in shares for name, why in reasons.items()}
    everything = {at: scores for share, _ in shares for at, scores in share.items()}
    if not everything:
        why = next(iter(left_out.values()), "")
        raise ValueError(f"no image in {task.pictures.place} could be scored: {why}")
    sums = {n: r for n, r in task.rewards.items() if isinstance(r, WeightedSum)}
    for at, scores in everything.items():
        parts = {name: torch.tensor([value]) for name, value in scores.items()}
        items[at].scores.update(scores | {n: r.mean(parts).item() for n, r in sums.items()})
    return [item for item in items.values() if item.scores], left_out


def items_of(task: Scoring) -> tuple[dict[int, ScoredPicture], dict[str, str]]:
    """The pictures by their places, not yet scored, and why some cannot be read, by name.

    Raises ValueError for these, unless they are skipped, and for a picture whose prompt nobody
    tells though some reward looks at it.
    """
    items: dict[int, ScoredPicture] = {}
    bad: dict[str, str] = {}
    mine = identities(task.pictures, ranks.share(range(len(task.pictures.items))))
    each = [pair for share in ranks.of_each_rank(mine) for pair in share.items()]
    disagreeing = 0
    for at, one in sorted(each, key=lambda pair: pair[0]):
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
        raise ValueError(next(iter(bad.values())) + HINT)
    if disagreeing and ranks.is_first():
        other = "another seed or prompt than they carry themselves, which are believed"
        click.echo(f"samples.json gives {disagreeing} of {len(items)} images {other}", err=True)
    return items, bad


def read_cache(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The scores that earlier runs wrote, by picture and prompt; ValueError for another file."""
    cache: dict[tuple[str, str], dict[str, float]] = {}
    for path in sorted(folder.glob(CACHE.format("*"))):
        for line in read_jsonl(path):
            match line:
                case {"picture": str(picture), "prompt": str(prompt), "scores": dict(scores)}:
                    cache.setdefault((picture, prompt), {}).update(scores)
                case _:
                    raise ValueError(f"{path} holds a line that is no score: delete the file")
    return cache


def score_images(
    task: Scoring,
    items: Mapping[int, ScoredPicture],
    which: Sequence[int],
    images: Tensor,
    bad: dict[str, str],
) -> Iterator[tuple[int, dict[str, float]]]:
    """The scores by single rewards of images of one size, the items `which`.

    A batch that breaks is scored one by one, and what has no scores goes into `bad`; ValueError
    instead, with the first and the last image, where the task does not skip them.
    """
    pictures = [items[at] for at in which]
    prompts, rewards = [one.prompt for one in pictures], single_rewards(task.rewards)
    try:
        scores = score_all(rewards, images, prompts, batch=task.batch)
    except ValueError as error:
        if not task.skip_bad:
            where = f"images {pictures[0].name} to {pictures[-1].name}"
            raise ValueError(f"{error} ({where})") from error
        if len(which) == 1:
            bad[pictures[0].name] = str(error)
        else:
            for i, at in enumerate(which):
                yield from score_images(task, items, [at], images[i : i + 1], bad)
        return
    for at, row in zip(which, torch.stack([*scores.values()], 1).tolist(), strict=True):
        yield at, dict(zip(scores, row, strict=True))


# --- what is written ------------------------------------------------------------------------


def column(scored: Sequence[ScoredPicture], name: str) -> Tensor:
    """The scores [N] of a reward."""
    return torch.tensor([one.scores[name] for one in scored], dtype=torch.float64)


def named(estimate: Estimate) -> dict[str, float]:
    """A mean and its interval by their names."""
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def write_scores(
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
    numbers: dict[str, dict[str, float]] = {}
    rows = [("reward", "mean [95 %]", "spread")]
    for name in names:
        values = column(scored, name)
        mean, spread = mean_of(values), values.std(correction=len(values) > 1).item()
        ends = {"min": values.min().item(), "max": values.max().item()}
        numbers[name] = {**named(mean), "std": spread, **ends}
        rows.append((name, str(mean), f"{spread:.4f}"))
    settings = {
        "amp": setup.amp and task.device.type != "cpu",
        **{f"weights of {n}": str(p) for n, p in setup.paths.items()},
    }
    about = {"place": str(place), "count": len(scored), "left_out": left_out}
    about |= {"rewards": numbers, "settings": settings, "fingerprints": list(task.keys.values())}
    write_json(folder / "summary.json", {**about, **provenance(task.device)})
    if output_json:
        images = [{"file": one.name, "prompt": one.prompt, **one.scores} for one in scored]
        write_json(output_json, {"rewards": numbers, "images": images})
    click.echo(f"{len(scored)} images of {place}; all in {folder}\n{aligned(rows)}")
    if left_out:
        click.echo(f"{len(left_out)} images left out:", err=True)
    for name, why in left_out.items():
        click.echo(f"  {name}: {why}", err=True)


def write_versus(
    places: Sequence[Path],
    scored: Sequence[Sequence[ScoredPicture]],
    names: Sequence[str],
    folder: Path,
) -> None:
    """The pairs of two places, written and printed: who leads, and how often."""
    both = pairs(scored[0], scored[1])
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    rows = [("reward", "second - first [95 %]", "second wins [95 %]")]
    for name in names:
        a, b = (column([pair[side] for pair in both], name) for side in (0, 1))
        lead, wins = mean_of(b - a), win_rate(b - a)
        of = {"first": mean_of(a), "second": mean_of(b), "difference": lead, "win_rate": wins}
        numbers[name] = {what: named(estimate) for what, estimate in of.items()}
        rows.append((name, str(lead), str(wins)))
    about = {"first": str(places[0]), "second": str(places[1]), "pairs": len(both)}
    unpaired = [len(one) - len(both) for one in scored]
    write_json(folder / "versus.json", {**about, "unpaired": unpaired, "rewards": numbers})
    click.echo(f"{len(both)} pairs of one seed and prompt, {sum(unpaired)} images without")
    click.echo(aligned(rows))


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


if __name__ == "__main__":
    main()
