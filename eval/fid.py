"""FID and its kin of a folder or a zip of images, compatible with EDM's fid.py.

    python -m eval.fid ref --data dataset.zip --dest dataset.npz
    python -m eval.fid calc --images samples --ref dataset.npz --num 50000
    torchrun --nproc_per_node=2 -m eval.fid calc --images samples --ref dataset.npz

FID is the Frechet distance (Heusel et al. 2017, arXiv:1706.08500, Eq. 6) in the features of
Inception; other features make other distances, which compare with nothing but themselves.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch

from eval.features import SPACES, Space, load_space
from eval.gather import Gathered, How, gather, on_first
from eval.known import METRICS, compared, known_of, save_statistics
from eval.machine import provenance
from eval.pictures import find_pictures, subset
from src import ranks
from src.files import nearest, write_json
from src.options import Device, OneLineCommand, OneLineGroup, one_line_errors


class Metrics(click.ParamType):
    """`fid,kid,pr` -> the tuple of their names."""

    name = ",".join(METRICS)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        for name in names:
            if name not in METRICS:
                self.fail(f"no metric '{name}': did you mean {nearest(name, METRICS)}?", param)
        return names


@dataclass(frozen=True)
class Reading:
    """The options that both commands have."""

    features: str
    weights: Path | None
    batch: int
    skip_bad: bool
    cache: Path | None
    device: torch.device

    def start(self, *, keep: bool) -> tuple[torch.device, Space, How]:
        """Join the ranks and load the network."""
        device = ranks.init(self.device)
        space = load_space(self.features, device, self.weights)
        return device, space, How(self.batch, self.skip_bad, self.cache, keep)


SPACE_HELP = f"{', '.join(SPACES)} or MODULE:NAME."
READING = (
    click.option("--features", default="inception", help=SPACE_HELP),
    click.option("--weights", type=click.Path(path_type=Path), help="Of inception, clip, onnx."),
    click.option("--batch", type=click.IntRange(1), default=64, help="Images at once, up to 256."),
    click.option("--skip-bad", "--skip_bad", is_flag=True, help="Leave out, count and list."),
    click.option("--cache", type=click.Path(path_type=Path), help="Keep features, to go on."),
    click.option("--device", type=Device(), default="auto"),
)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Those options, handed over as `reading`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **given: Any) -> None:
        own = {field.name: given.pop(field.name) for field in fields(Reading)}
        command(*args, reading=Reading(**own), **given)

    return functools.reduce(lambda made, option: option(made), reversed(READING), wrapped)


@click.group(cls=OneLineGroup)
def main() -> None:
    """FID and its kin, with the sub-commands and numbers of EDM's fid.py."""


@main.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder or zip.")
@click.option("--ref", type=click.Path(path_type=Path), required=True, help=".npz, folder, zip.")
@click.option("--num", type=click.IntRange(2), help="How many; fewer are an error. Default: all.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Draws them where there are more.")
@click.option("--metrics", type=Metrics(), default="fid", help="Of fid,kid,pr.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON with the numbers.")
@reading_options
@one_line_errors
def calc(
    images: Path,
    ref: Path,
    num: int | None,
    seed: int,
    metrics: tuple[str, ...],
    out: Path | None,
    reading: Reading,
) -> None:
    """Compare images with reference statistics, or with images.

    \b
    python -m eval.fid calc --images samples --ref cifar10-32x32.npz --num 50000
    python -m eval.fid calc --images a --ref b --features efficientnet --metrics fid,kid,pr
    python -m eval.fid calc --images a --ref b --features onnx --weights dinov2.onnx
    """  # noqa: D301
    pictures = subset(find_pictures(images), num, seed)
    device, space, how = reading.start(keep=metrics != ("fid",))
    known = known_of(ref, space, how)
    found = gather(pictures, space, how)

    def report() -> None:
        numbers = compared(found, known, metrics, device)
        about = {"images": str(images), "ref": str(ref), "features": space.about}
        about |= {"count": found.moments.count, "ref_count": known.gaussian.count}
        if out:
            write_json(out, {**numbers, **about, "left_out": found.bad, **provenance(device)})
        tell(numbers, found, space, ref)

    on_first(report)
    ranks.close()


@main.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder or zip.")
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="The .npz to write.")
@click.option("--keep_features", is_flag=True, help="For kid and pr: 8 KB an image.")
@reading_options
@one_line_errors
def ref(data: Path, dest: Path, keep_features: bool, reading: Reading) -> None:
    """Write the reference statistics of a data set.

    \b
    python -m eval.fid ref --data cifar10-32x32.zip --dest cifar10-32x32.npz
    """  # noqa: D301
    if dest.suffix != ".npz":
        raise ValueError(f"--dest {dest} must end in .npz")
    pictures = find_pictures(data)
    device, space, how = reading.start(keep=keep_features)
    found = gather(pictures, space, how)

    def report() -> None:
        about = {"features": space.about, "images": str(data), **provenance(device)}
        save_statistics(dest, found, about)
        tell({}, found, space, dest)

    on_first(report)
    ranks.close()


def tell(numbers: dict[str, Any], found: Gathered, space: Space, other: Path) -> None:
    """Print the numbers, and what is to be known of them."""
    name = "FID" if space.name == "inception" else f"Frechet distance ({space.name})"
    lines = []
    if "fid" in numbers:
        lines.append(f"{name} {numbers['fid']:.6g}")
    if "kid" in numbers:
        low, high = numbers["kid_95"]
        lines.append(f"KID {numbers['kid']:.4g}, 95 % between {low:.4g} and {high:.4g}")
    if "precision" in numbers:
        lines.append(f"precision {numbers['precision']:.4f}, recall {numbers['recall']:.4f}")
    count, size = found.moments.count, len(found.moments.mean)
    lines.append(f"{count} images, {size} features ({space.name}), {other}")
    for line in lines:
        click.echo(line)
    if found.bad:
        click.echo(f"{len(found.bad)} images left out:", err=True)
    for file, why in found.bad.items():
        click.echo(f"  {file}: {why}", err=True)
    if "fid" in numbers and count <= size:
        few = f"{count} images are not more than the {size} features"
        click.echo(f"{few}: the distance is far too high, compare at this number only", err=True)


if __name__ == "__main__":
    main()
