"""Learning curves of stage 2 under several settings, seed by seed, at equal images.

    python -m exps.study.sweep --config exps/mixture-3x4x4/groupings.yaml \
        --vary ppo.grouping=crn,prompt,mixed --seeds 0-4 --outdir exps/mixture-3x4x4

--vary again adds curves of another key; settings after a space hold for its values alone, as in
--vary "ppo.method=cma ppo.rloo_k=16". Every run is `python -m training.ppo.launch` with one value
and one seed. What has ended is not run again, unless its settings are others.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

from backends.load import find_model
from backends.mixture import Mixture, read_mixture
from src.files import read_jsonl, read_text, write_atomically, write_text
from src.options import OneLineCommand, SeedList
from src.stats import Estimate, mean_of
from training.ppo.config import load_config, to_yaml


def nearness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward for mixture-3x4x4: minus the squared distance to the mean of the class, in stds."""
    mixture = shipped_mixture()
    classes = torch.tensor([int(prompt) for prompt in prompts])
    means, std = mixture.means[classes].clamp(-1, 1), mixture.std[classes]
    means, std = means.to(images.device), std.to(images.device)
    return -(images.double() * 2 - 1 - means).square().flatten(1).mean(1) / std.square()


@cache
def shipped_mixture() -> Mixture:
    """The mixture that ships."""
    return read_mixture(find_model("mixture-3x4x4"))[0]


def curve(runs: Sequence[Sequence[dict[str, float]]], name: str) -> list[tuple[int, Estimate]]:
    """Step by step, the mean of a metric over runs and its 95 % interval; steps that all have."""
    values: dict[int, list[float]] = {}
    for line in (line for run in runs for line in run if name in line):
        values.setdefault(int(line["step"]), []).append(line[name])
    whole = {step: each for step, each in values.items() if len(each) == len(runs)}
    return [(step, mean_of(torch.tensor(whole[step]))) for step in sorted(whole)]


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--config", required=True, help="A file of training/ppo/cfgs.")
@click.option(
    "--vary", multiple=True, required=True, help="'section.key=value,value,... [more=...]'"
)
@click.option("--override", multiple=True, help="section.key=value, for all.")
@click.option("--seeds", type=SeedList(), default="0-4")
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
def main(
    config: str, vary: tuple[str, ...], override: tuple[str, ...], seeds: list[int], outdir: Path
) -> None:
    """Train with every value and seed; write curves.csv and curves.png to OUTDIR."""
    arms: dict[str, tuple[str, ...]] = {}
    for text in vary:
        varied, *fixed = text.split() or [""]
        key, _, values = varied.partition("=")
        for value in values.split(","):
            if not value or value in arms:
                raise ValueError(
                    f"--vary {text!r}: write section.key=value,value, each value once"
                )
            arms[value] = (f"{key}={value}", *fixed)
    name, batch, rows = "", 0, ["value,images,gain,low,high"]
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for value, own in arms.items():
        runs = []
        for seed in seeds:
            folder = outdir / "runs" / f"{value}-{seed}"
            here = (*override, *own, f"run.seed={seed}", f"run.output_root={folder}")
            settings, ended = load_config(config, here), folder / "ended.yaml"
            name, batch = settings.reward.name, settings.ppo.rollout_batch_size
            if not ended.exists() or read_text(ended) != to_yaml(settings):
                more = [w for o in here for w in ("--override", o)]
                command = [sys.executable, "-m", "training.ppo.launch", "--config", config]
                if subprocess.run([*command, *more]).returncode:
                    raise ValueError(f"the run of {value} with seed {seed} failed, see above")
                write_text(ended, to_yaml(settings))
            files = sorted(folder.rglob("metrics.jsonl"))
            runs.append(read_jsonl(files[-1]) if files else [])
        line = curve(runs, f"eval/{name}_gain")
        if not line:
            raise ValueError(f"the runs of {value} have no gain of {name}: set ppo.eval_interval")
        images = [step * batch for step, _ in line]
        axes.plot(images, [g.value for _, g in line], marker=".", label=value)
        axes.fill_between(images, [g.low for _, g in line], [g.high for _, g in line], alpha=0.2)
        rows += [f"{value},{s * batch},{g.value:.6g},{g.low:.6g},{g.high:.6g}" for s, g in line]
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="images trained on", ylabel=f"gain of {name.rpartition(':')[2]}, held out")
    axes.legend(title=f"{len(seeds)} seeds, 95 % intervals")
    write_text(outdir / "curves.csv", "\n".join(rows) + "\n")
    with write_atomically(outdir / "curves.png") as part:
        figure.savefig(part, format="png", dpi=120)


if __name__ == "__main__":
    main()
