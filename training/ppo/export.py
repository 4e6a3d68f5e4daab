"""Make a predictor of a checkpoint: the mean of its policy, for sample.py."""

from functools import partial
from pathlib import Path

import click

from solvers.predictor import save_predictor
from src.options import OneLineCommand, one_line_errors
from training.checkpoint import latest_checkpoint, read_sealed
from training.ppo.state import exported


@click.command(cls=OneLineCommand)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), required=True, help="File, or run's folder."
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="A .pkl or .json to write."
)
@one_line_errors
def main(checkpoint: Path, output: Path) -> None:
    """Write the predictor of a checkpoint; of a run's folder, that of its newest whole one.

    \b
    python -m training.ppo.export --checkpoint exps/RUN --output ours.pkl
    """  # noqa: D301
    if output.suffix not in (".pkl", ".json"):
        raise ValueError(f"--output {output}: a predictor's file ends in .pkl or .json")
    path, content = checkpoint, {}
    if checkpoint.is_dir():
        inside = checkpoint / "checkpoints"
        folder = inside if inside.is_dir() else checkpoint
        path, content = latest_checkpoint(folder, partial(click.echo, err=True))
    predictor = exported(content or read_sealed(path), str(path))
    output.parent.mkdir(parents=True, exist_ok=True)
    save_predictor(predictor, output)
    click.echo(f"{output}: step {predictor.recipe.training['ppo']['step']} of {path}")


if __name__ == "__main__":
    main()
