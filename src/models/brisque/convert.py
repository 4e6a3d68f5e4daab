"""Turn the model of the PyPI package brisque 0.2.0 (Apache-2.0) into one file of tensors.

Nothing of the package is run: its regression is read as text, its ranges as plain values.
"""

import sys
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from rewards.brisque import MODEL
from solvers.persistence import read_persistent
from src.files import read_text, write_atomically

FEATURES = 36


def regression(text: str) -> dict[str, Tensor]:
    """-> the tensors of a libsvm file of support vector regression with a Gaussian kernel."""
    head, _, body = text.partition("SV\n")
    told = dict(line.split(" ", 1) for line in head.splitlines())
    rows = [line.split() for line in body.splitlines()]
    vectors = torch.zeros(len(rows), FEATURES)
    for i, row in enumerate(rows):
        for place, value in (cell.split(":") for cell in row[1:]):
            vectors[i, int(place) - 1] = float(value)
    return {
        "vectors": vectors,
        "coefficients": torch.tensor([float(row[0]) for row in rows]),
        "rest": torch.tensor([float(told["gamma"]), float(told["rho"])]),
    }


@click.command()
@click.option("--models", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=MODEL, show_default=False)
def main(models: Path, out: Path) -> None:
    """Write model.safetensors from the package's folder of models.

    Example: python src/models/brisque/convert.py --models unpacked/brisque/models
    """
    ranges = read_persistent(models / "normalize.pickle")
    state = regression(read_text(models / "svm.txt"))
    state |= {name: torch.tensor(ranges[f"{key}_"]) for name, key in
              (("low", "min"), ("high", "max"))}  # fmt: skip
    with write_atomically(out) as temp:
        save_file(state, temp)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
