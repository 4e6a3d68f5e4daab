"""Learning curves of stage 2 by grouping: common random numbers, one prompt, and as published.

Every run has the same budget of images and the same settings but for `ppo.grouping` and the seed;
the gain is that of the policy's mean over the start, on held-out prompts and noises. A stopped
comparison goes on where it was. From the repository's root:

    python -m exps.groupings --config training/ppo/cfgs/tiny_sd3.yaml --outdir exps/tiny-sd3/curves
    python -m exps.groupings --config exps/mixture-3x4x4/groupings.yaml --outdir exps/mixture-3x4x4

The second is of a Gaussian mixture, where images cost nothing and the reward is exact.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from backends.load import find_model
from backends.mixture import Mixture, read_mixture
from eval.machine import provenance
from src.files import write_json, write_text
from src.intervals import Estimate, mean_of
from src.options import Device, OneLineCommand, SeedList, one_line_errors
from src.runs import Metrics
from training.checkpoint import checkpoints
from src.figures import save
from training.ppo.config import load_config
from training.ppo.data import predictor_of, prompts_of
from training.ppo.launch import make_task
from training.ppo.sections import Config
from training.ppo.task import Task
from training.ppo.trainer import train

GROUPINGS = ("crn", "prompt", "mixed")
Curve = Sequence[tuple[int, Estimate]]
"""Images so far, and the gain over all seeds."""


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", "file", required=True, help="A file of training/ppo/cfgs.")
@click.option("--override", multiple=True, help="section.key=value; again for another.")
@click.option("--seeds", type=SeedList(), default="0-4")
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(
    file: str, override: tuple[str, ...], seeds: list[int], outdir: Path, device: torch.device
) -> None:
    """Train with every grouping and seed, and draw the curves."""
    config = load_config(file, override)
    if not config.ppo.eval_interval:
        raise ValueError("ppo.eval_interval 0 leaves nothing to draw: set it above 0")
    task = make_task(config, predictor_of(config), prompts_of(config), device)
    found: dict[str, Curve] = {}
    for grouping in GROUPINGS:
        folders = [outdir / "runs" / f"{grouping}-{seed}" for seed in seeds]
        for seed, folder in zip(seeds, folders, strict=True):
            one_run(config, task, grouping, seed, folder)
        found[grouping] = curve(folders, config)
    write(found, config, len(seeds), outdir, device)
    click.echo(f"{outdir / 'curves.png'}, curves.csv, summary.json")


def nearness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward for mixture-3x4x4: minus the squared distance to the mean of the class, in stds."""
    mixture = shipped_mixture()
    classes = torch.tensor([int(prompt) for prompt in prompts])
    means, std = mixture.means[classes].clamp(-1, 1), mixture.std[classes]
    return -(images.double() * 2 - 1 - means).square().flatten(1).mean(1) / std.square()


@cache
def shipped_mixture() -> Mixture:
    """The mixture that ships."""
    return read_mixture(find_model("mixture-3x4x4"))[0]


def one_run(config: Config, task: Task, grouping: str, seed: int, folder: Path) -> None:
    """Train with one grouping and seed, or what is left of it."""
    train(
        dataclasses.replace(task, seed=seed),
        dataclasses.replace(config.ppo, grouping=grouping),
        config.logging,
        folder,
        resume=folder if checkpoints(folder / "checkpoints") else None,
        say=partial(tqdm.write, file=sys.stderr),
    )


def curve(folders: Sequence[Path], config: Config) -> Curve:
    """The mean gain of several runs, and its 95 % interval over them, at each evaluation."""
    name = f"eval/{config.reward.name}_gain"
    gains: dict[int, list[float]] = {}
    for folder in folders:
        for line in Metrics(folder / "logs" / "metrics.jsonl").read():
            if name in line:
                gains.setdefault(line["step"], []).append(line[name])
    images = config.ppo.rollout_batch_size
    whole = {step: values for step, values in gains.items() if len(values) == len(folders)}
    return [(step * images, mean_of(torch.tensor(whole[step]))) for step in sorted(whole)]


def reached(one: Curve, gain: float) -> int | None:
    """After how many images a curve is at a gain; None where it never is."""
    return next((images for images, found in one if found.value >= gain), None)


def write(
    found: Mapping[str, Curve], config: Config, seeds: int, outdir: Path, device: torch.device
) -> None:
    """The curves as numbers and a picture, and what they come to."""
    rows = ["grouping,images,gain,low,high"]
    for grouping, one in found.items():
        rows += [f"{grouping},{n},{g.value:.6g},{g.low:.6g},{g.high:.6g}" for n, g in one]
    write_text(outdir / "curves.csv", "\n".join(rows) + "\n")
    published = found["mixed"][-1][1].value
    summary = {
        "reward": config.reward.name,
        "seeds": seeds,
        "images": config.ppo.steps * config.ppo.rollout_batch_size,
        "final": {g: dataclasses.asdict(one[-1][1]) for g, one in found.items()},
        "images_to_the_final_gain_of_mixed": {
            g: reached(one, published) for g, one in found.items()
        },
        **provenance(device),
        "ppo": {k: v for k, v in dataclasses.asdict(config.ppo).items() if k != "grouping"},
    }
    write_json(outdir / "summary.json", summary)
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for grouping, one in found.items():
        images = [n for n, _ in one]
        axes.plot(images, [g.value for _, g in one], marker=".", label=grouping)
        axes.fill_between(images, [g.low for _, g in one], [g.high for _, g in one], alpha=0.2)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("images trained on")
    name = config.reward.name.rpartition(":")[2]
    axes.set_ylabel(f"gain of {name},\nheld-out prompts and noises")
    axes.legend(title=f"{seeds} seeds, 95 % intervals")
    save(figure, outdir / "curves.png")


if __name__ == "__main__":
    main()
