"""Sample from Stable Diffusion 3 with a learned predictor: sample.py with SD3's presets."""

import runpy
from pathlib import Path
from typing import Any

import click

from solvers.predictor import find_predictor, load_predictor
from src.options import OneLineCommand, SeedList, one_line_errors

MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
COMMON = Path(__file__).resolve().with_name("sample.py")


@click.command(
    cls=OneLineCommand,
    context_settings={"show_default": True, "ignore_unknown_options": True},
)
@click.option("--predictor", "--predictor_path", default="sd3-512-best", help="Path or name.")
@click.option("--model", default=MODEL, help="Folder, single file, or a name on the hub.")
@click.option("--seeds", type=SeedList(), default="0-3", help='Such as "0-63,100".')
@click.option("--max-batch-size", "--batch", type=click.IntRange(1), default=4)
@click.option("--dtype", default="float16", help="Of the network; x stays float32.")
@click.option("--outdir", default="samples/sd3", help="Where the pictures go.")
@click.argument("others", nargs=-1, type=click.UNPROCESSED)
@one_line_errors
def main(others: tuple[str, ...], **options: Any) -> None:
    """Sample images by text; OTHERS are options of sample.py (--prompt, --prompt-file, ...).

    Unless --resolution is there, the predictor's own is taken.

    \b
    python sample_sd3.py --predictor sd3-1024-best --seeds 0-3 --prompt "a red fox in the snow"
    """  # noqa: D301
    recipe = load_predictor(find_predictor(options["predictor"])).recipe
    arguments = [
        *("--predictor", options["predictor"]),
        *("--model", options["model"]),
        *("--seeds", ",".join(map(str, options["seeds"]))),
        *("--batch", str(options["max_batch_size"])),
        *("--dtype", options["dtype"]),
        *("--outdir", options["outdir"]),
        *others,
    ]
    own = any(other.split("=")[0] == "--resolution" for other in others)
    if recipe.img_resolution and not own:
        arguments += ["--resolution", str(recipe.img_resolution)]
    command = runpy.run_path(str(COMMON))["main"]
    command.main(arguments, prog_name="sample_sd3.py", standalone_mode=False)


if __name__ == "__main__":
    main()
