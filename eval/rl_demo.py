"""Stage 2 on the small text-to-image model: train on one reward, judge before and after by others.

bash launch.sh rl-demo

Half of the held-out prompts choose the best table on the way, the other half, with noises of their
own, are what is reported; the trained reward is a small CLIP, the judges are no part of training.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor

from backends.base import Backend
from backends.generate import Job, generate
from backends.load import load_backend
from backends.methods import predictor_method
from eval.demo import draw_grid
from eval.machine import ROOT
from eval.report import aligned
from rewards.base import Reward
from rewards.registry import Setup, load_reward
from rewards.scorer import score_all
from solvers.predictor import find_predictor, load_predictor
from src.files import read_text, write_atomically, write_json, write_text
from src.images import save_png
from src.intervals import Estimate, mean_of, win_rate
from src.options import Device, OneLineCommand, one_line_errors
from src.runs import Metrics
from src.text import read_prompts

CONFIG = ROOT / "training" / "ppo" / "cfgs" / "tiny_sd3.yaml"
JUDGES = ("efficientnet-minilm",)
SHOWN = 10
BATCH = 16
BEST = "export/network-snapshot-export-best.pkl"


@dataclass(frozen=True)
class Compared:
    """A reward's scores before and after, of the same prompts and noises.

    The mean of each prompt's images: images of a prompt are no independent witnesses.
    """

    name: str
    before: Tensor  # [P]
    after: Tensor

    @property
    def gain(self) -> Estimate:
        """The mean paired difference."""
        return mean_of(self.after - self.before)

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        gain, wins = self.gain, win_rate(self.after - self.before)
        ends = f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        means = (f"{v.mean().item():.4f}" for v in (self.before, self.after))
        return (self.name, *means, ends, f"{wins.value:.2f}")

    @property
    def plain(self) -> dict[str, float]:
        """For results.json."""
        gain = self.gain
        means = {"before": self.before.mean().item(), "after": self.after.mean().item()}
        return {**means, "gain": gain.value, "low": gain.low, "high": gain.high}


def judges_here(names: Sequence[str], device: torch.device) -> dict[str, Reward]:
    """Those judges whose weights are here; of the others it is said how to get them."""
    found = {}
    for name in names:
        try:
            found[name] = load_reward(name, Setup(device))
        except ValueError as error:
            click.echo(f"without {name}: {error}", err=True)
    return found


def halves(path: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """-> a file of every second held-out prompt, to choose by, and the others, to report on."""
    prompts = read_prompts(path)
    write_text(folder / "choose.txt", "\n".join(prompts[::2]) + "\n")
    return folder / "choose.txt", tuple(p for p in prompts[1::2] if p not in prompts[::2])


def train(folder: Path, overrides: Sequence[str], device: torch.device) -> Path:
    """Run the training command that people run -> the run's folder; ValueError if it fails."""
    told = [f"run.output_root={folder / 'runs'}", *overrides]
    given = [part for one in told for part in ("--override", one)]
    command = [sys.executable, "-m", "training.ppo.launch", "--config", str(CONFIG), *given]
    command += ["--device", str(device)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise ValueError(f"training ended with status {done.returncode}: see above")
    return max((folder / "runs").iterdir())


def images_of(backend: Backend, predictor: str, jobs: Sequence[Job]) -> Tensor:
    """-> [N, 3, H, W] in [0, 1], as sample.py makes them."""
    found = load_predictor(find_predictor(predictor))
    method = predictor_method(found, backend.levels)
    return torch.cat([b.images.cpu() for b in generate(backend, method, jobs, batch=BATCH)])


def compared(
    rewards: Mapping[str, Reward], images: Mapping[str, Tensor], prompts: Sequence[str]
) -> list[Compared]:
    """The scores by every reward of the images before and after, prompt by prompt."""
    before, after = (score_all(rewards, images[n], prompts, batch=64) for n in ("before", "after"))
    return [
        Compared(name, by_prompt(before[name], prompts), by_prompt(after[name], prompts))
        for name in rewards
    ]


def by_prompt(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores [N] of N prompts -> the mean of each distinct one, [P]."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    which = torch.tensor([places[prompt] for prompt in prompts])
    return torch.stack([scores[which == i].mean() for i in range(len(places))])


def draw_curve(path: Path, told: Sequence[Mapping[str, Any]], per_step: int) -> None:
    """The gains on held-out prompts with their 95 % intervals, by images trained on."""
    ends = "_gain_high"
    names = [n.removesuffix(ends) for n in told[0] if n.endswith(ends)] if told else []
    figure = Figure((4.2 * max(len(names), 1), 3.2))
    axes = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        lines = [line for line in told if name + ends in line]
        trained = [line["step"] * per_step for line in lines]
        low, mean, high = (
            [line[f"{name}_gain{e}"] for line in lines] for e in ("_low", "", "_high")
        )
        axis.fill_between(trained, low, high, alpha=0.25)
        axis.plot(trained, mean, marker="o", markersize=3)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(f"{name.removeprefix('eval/')}: gain over the start")
        axis.set_xlabel("images trained on")
    figure.tight_layout()
    with write_atomically(path) as temp:
        figure.savefig(temp, dpi=120)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--override", multiple=True, help="Of tiny_sd3.yaml: ppo.steps=50, say; again.")
@click.option("--images", type=click.IntRange(2), default=190, help="To report on.")
@click.option("--seed", type=click.IntRange(0), default=1000, help="First of the fresh noises.")
@click.option("--outdir", type=click.Path(path_type=Path), default="samples/rl-demo")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(
    override: tuple[str, ...], images: int, seed: int, outdir: Path, device: torch.device
) -> None:
    """Train the small model's table on a reward; sample and score it before and after.

    Writes curve.png, grid.png, before/ and after/, results.json; the run is in runs/.
    """
    held_out = ROOT / "src" / "prompts" / "emoji-heldout.txt"
    choose, prompts = halves(held_out, outdir)
    judges = judges_here(JUDGES, device)
    told = [f"data.heldout_prompts={choose}", f"reward.judges=[{','.join(judges)}]", *override]
    run = train(outdir, told, device)
    config: Any = OmegaConf.create(read_text(run / "configs" / "resolved_config.yaml"))
    path = config.reward.weights_path
    setup = Setup(device, paths={config.reward.type: path} if path else {})
    rewards = {config.reward.type: load_reward(config.reward.type, setup), **judges}
    backend = load_backend(config.model.model, device=device)
    jobs = [Job(seed + i, prompts[i % len(prompts)]) for i in range(images)]
    names = {"before": config.data.predictor_snapshot, "after": str(run / BEST)}
    click.echo(f"Sampling {len(jobs)} images of prompts and noises apart from training, twice.")
    made = {name: images_of(backend, names[name], jobs) for name in names}
    for name, pictures in made.items():
        for job, picture in zip(jobs, pictures, strict=True):
            about = {"recipe": {"seed": job.seed, "prompt": job.prompt}}
            save_png(outdir / name / f"{job.seed:06d}.png", picture, about)
    found = compared(rewards, made, [str(job.prompt) for job in jobs])
    metrics = Metrics(run / "logs" / "metrics.jsonl").read()
    evaluations = [line for line in metrics if "eval/best_step" in line]
    draw_curve(outdir / "curve.png", evaluations, config.ppo.rollout_batch_size)
    shown = sorted({i * len(jobs) // SHOWN for i in range(SHOWN)})
    rows = [(name, pictures[shown]) for name, pictures in made.items()]
    draw_grid(outdir / "grid.png", rows, [str(jobs[i].prompt)[:12] for i in shown])
    counts = {
        "images": len(jobs),
        "prompts": len({job.prompt for job in jobs}),
        "best_step": evaluations[-1]["eval/best_step"],
    }
    write_json(outdir / "results.json", {**counts, "scores": {c.name: c.plain for c in found}})
    head = ("reward", "before", "after", "gain and 95 % interval", "wins")
    click.echo(aligned([head, *(c.cells for c in found)]))
    click.echo(f"{config.reward.type} was trained on, the others were not.")
    for name in ("curve.png", "grid.png", "results.json"):
        click.echo(f"  {outdir / name}")


if __name__ == "__main__":
    main()
