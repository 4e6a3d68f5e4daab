"""Make a predictor of a checkpoint: the mean of its policy, for sample.py."""

from functools import partial
from pathlib import Path

import click

from solvers.predictor import from_content, save_predictor
from src.options import OneLineCommand
from training.ppo.trainer import export_path, read_checkpoint


@click.command(cls=OneLineCommand)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File, or run's folder.")
@click.option("--output", type=click.Path(path_type=Path), help="A .pkl or .json to write.")
def main(run: Path | None, checkpoint: Path | None, output: Path | None) -> None:
    """Write the predictor of a checkpoint; of a run's folder, that of its newest whole one.

    With RUN, a checkpoint is looked for in that folder, and the predictor goes to its export/.

    \b
    python -m training.ppo.export --checkpoint exps/RUN --output ours.pkl
    python -m training.ppo.export exps/RUN --checkpoint checkpoints/checkpoint-00000100.pt
    """  # noqa: D301
    if run is None and checkpoint is None:
        raise ValueError("--checkpoint is missing: a file, or a run's folder")
    if run is None and output is None:
        raise ValueError("--output is missing: a .pkl or .json to write")
    if output is not None and output.suffix not in (".pkl", ".json"):
        raise ValueError(f"--output {output}: a predictor's file ends in .pkl or .json")
    source = checkpoint or run
    if run is not None and checkpoint is not None:
        inside = (run / checkpoint, run / "checkpoints" / checkpoint)
        source = next((path for path in inside if path.exists()), checkpoint)
    assert source is not None
    if not source.exists():
        raise ValueError(f"no run and no checkpoint at {source}: give a run's folder, or a file")
    path, content = read_checkpoint(source, partial(click.echo, err=True))
    predictor, step = from_content(content["predictor"]), content["step"]
    output = output or export_path(run or source, step)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_predictor(predictor, output)
    click.echo(f"{output}: step {step} of {path}")


if __name__ == "__main__":
    main()
