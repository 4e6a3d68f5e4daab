"""The pictures of a place scored under their prompts, picture by picture on disk.

Every batch is written as soon as it is scored, so that a run goes on where another stopped, with
any number of ranks. Shapes: n pictures of a batch.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.gather import raise_together
from eval.pictures import Alike, Picture, Pictures, prompt_in, read_batches
from rewards.base import Reward
from rewards.scorer import names_of, score_all
from src import ranks
from src.files import append_jsonl, read_json, read_jsonl, write_json, write_text

ABOUT = "about.json"
RECORDS = "records-{}.jsonl"
KEYS = {"file", "stamp", "seed", "prompt", "scores"}


@dataclass(frozen=True)
class Scored:
    """A picture with its scores, each in its reward's own units."""

    name: str
    seed: int | None
    prompt: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is to be scored, and how."""

    pictures: Pictures
    prompts: tuple[str, ...] | None  # one a picture; None: what the pictures say
    rewards: Mapping[str, Reward]
    device: torch.device
    batch: int = 64
    skip_bad: bool = False

    def prompt(self, i: int) -> str | None:
        """The prompt of a picture as far as it is known before it is read."""
        return self.prompts[i] if self.prompts else self.pictures.items[i].prompt


def prompts_for(pictures: Pictures, given: Sequence[str]) -> tuple[str, ...] | None:
    """One prompt a picture, in the order of the pictures; None where none is given.

    One serves all. ValueError for any other number.
    """
    count = len(pictures.items)
    if not given:
        return None
    if len(given) not in (1, count):
        raise ValueError(
            f"{count} images in {pictures.place} need as many prompts, or one, not {len(given)}"
        )
    return tuple(given) * (count if len(given) == 1 else 1)


def score_pictures(task: Task, folder: Path) -> tuple[list[Scored], dict[str, str]]:
    """All scores, on every rank, and why pictures were left out, by their names.

    Scores that the folder has already are kept; new ones are added batch by batch. Raises
    ValueError, on every rank, for a picture that cannot be read (unless the task skips it) or
    has no prompt, and for a reward that breaks.
    """
    wanted = names_of(task.rewards)
    known = records(folder)
    kept = {i: found for i, found in have(task, known).items() if set(wanted) <= set(found.scores)}
    missing = [i for i in range(len(task.pictures.items)) if i not in kept]
    ranks.barrier()  # all have read before the first writes
    bad: dict[str, str] = {}
    failed = ""
    try:
        for i, found in score_missing(task, ranks.share(missing), bad):
            write_record(folder, task, i, found)
            kept[i] = found
    except ValueError as error:
        failed = str(error)
    raise_together(failed)
    told = ranks.gather_objects((kept, bad))
    everything = {i: found for one, _ in told for i, found in one.items()}
    left_out = {name: why for _, reasons in told for name, why in reasons.items()}
    if not everything:
        why = next(iter(left_out.values()), "")
        raise ValueError(f"no image in {task.pictures.place} could be scored: {why}")
    return [everything[i] for i in sorted(everything)], left_out


def score_missing(
    task: Task, missing: Sequence[int], bad: dict[str, str]
) -> Iterator[tuple[int, Scored]]:
    """The scores of the pictures `missing`, a batch after the other."""
    skipped = bad if task.skip_bad else None
    with tqdm(total=len(missing), unit="image", disable=None) as bar:
        for alike in read_batches(task.pictures, missing, batch=task.batch, bad=skipped):
            yield from score_alike(task, alike, skipped)
            bar.update(len(alike.which))


def score_alike(
    task: Task, alike: Alike, bad: dict[str, str] | None
) -> Iterator[tuple[int, Scored]]:
    """The scores of pictures of one size; those that have none go into `bad`, one by one.

    Without `bad`, that is a ValueError, with the first and the last picture.
    """
    names = [task.pictures.items[i].name for i in alike.which]
    prompts = [
        known_prompt(task.prompt(i), text, name)
        for i, text, name in zip(alike.which, alike.texts, names, strict=True)
    ]
    images = alike.images.to(task.device).float() / 255
    try:
        scores = score_all(task.rewards, images, prompts, batch=task.batch)
    except ValueError as error:
        if bad is None:
            raise ValueError(f"{error} (images {names[0]} to {names[-1]})") from error
        if len(names) == 1:
            bad[names[0]] = str(error)
        else:
            for at in range(len(names)):
                yield from score_alike(task, alike.only(at), bad)
        return
    columns = {name: values.tolist() for name, values in scores.items()}
    for at, i in enumerate(alike.which):
        row = {name: values[at] for name, values in columns.items()}
        yield i, Scored(names[at], seed_of(task.pictures.items[i]), prompts[at], row)


def known_prompt(prompt: str | None, text: dict[str, str], name: str) -> str:
    """The prompt of a picture; ValueError where nobody tells it."""
    found = prompt_in(text, name) if prompt is None else prompt
    if found is None:
        raise ValueError(f"{name} does not say its prompt: give --prompt or --prompt-file")
    return found


def seed_of(item: Picture) -> int | None:
    """The seed that samples.json tells, or that the file is named by."""
    stem = Path(item.name).stem
    return int(stem) if item.seed is None and stem.isdecimal() else item.seed


def records(folder: Path) -> list[dict[str, Any]]:
    """What earlier runs wrote, the oldest first of each rank; ValueError for another file."""
    found = []
    for path in sorted(folder.glob(RECORDS.format("*"))):
        for line in read_jsonl(path):
            if not isinstance(line, dict) or not line.keys() >= KEYS:
                raise ValueError(f"{path} holds a line that is no record: delete the file")
            found.append(line)
    return found


def have(task: Task, known: Sequence[Mapping[str, Any]]) -> dict[int, Scored]:
    """What is known of pictures that are as they were, by their places."""
    places = {item.name: i for i, item in enumerate(task.pictures.items)}
    stamps: dict[str, str] = {}
    found: dict[int, Scored] = {}
    for line in known:
        i = places.get(line["file"])
        if i is None or task.prompt(i) not in (None, line["prompt"]):
            continue
        name = line["file"]
        stamps[name] = stamps.get(name) or task.pictures.stamp(task.pictures.items[i])
        if line["stamp"] == stamps[name]:
            before = found[i].scores if i in found else {}
            found[i] = Scored(name, line["seed"], line["prompt"], before | line["scores"])
    return found


def write_record(folder: Path, task: Task, i: int, found: Scored) -> None:
    """Add a picture's scores to those of this rank."""
    append_jsonl(
        folder / RECORDS.format(ranks.rank()),
        {
            "file": found.name,
            "stamp": task.pictures.stamp(task.pictures.items[i]),
            "seed": found.seed,
            "prompt": found.prompt,
            "scores": found.scores,
        },
    )


def open_scores(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or check that its scores were made with these settings.

    ValueError where one of them differs; those that the folder does not know yet are added.
    """
    path = folder / ABOUT
    known = read_json(path) if path.is_file() else {}
    for name, value in settings.items():
        if known.get(name, value) != value:
            fix = "choose another --outdir, or delete it"
            raise ValueError(f"{folder} has scores with other {name} ({known[name]}): {fix}")
    write_json(path, {**known, **settings})


def write_csv(path: Path, scored: Sequence[Scored], names: Sequence[str]) -> None:
    """A line a picture: file, seed, prompt and the scores."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "seed", "prompt", *names])
    for one in scored:
        seed = "" if one.seed is None else one.seed
        writer.writerow([one.name, seed, one.prompt, *(repr(one.scores[n]) for n in names)])
    write_text(path, text.getvalue())
