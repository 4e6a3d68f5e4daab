"""The references' recorded numbers, how near ours must come, and their names and shapes.

tests/data/parity.json is written by `make parity`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "parity.json"
SAME = 1e-4
"""Relative, in float32."""
RESIZED = 2e-3
"""Where a picture is resized: a pixel of a thousand may differ by a byte level."""
FLOATS = 0.05
"""hpsv2 resizes floats, not bytes, with whatever its torchvision holds to be right."""
EXACT = 1e-6
"""Float64."""


def limits(name: str) -> Sequence[float]:
    """How far apart, relative, each number of that name may be; the last one goes on."""
    if name == "hps":
        return (*[SAME] * 4, FLOATS)
    if name.startswith(("frechet", "kernel", "mps_stack")):
        return (EXACT,)
    return (SAME,) if name.startswith("inception") else (*[SAME] * 4, RESIZED)


def furthest(ours: Sequence[float], theirs: Sequence[float], allowed: Sequence[float]) -> float:
    """The largest difference in units of what is allowed; numbers below 0.01 count as that.

    theirs: as many as ours, or fewer: the first of them (hpsv2), or the last (pytorch-fid).
    """
    ours = ours[-len(theirs) :] if len(allowed) == 1 else ours[: len(theirs)]
    each = [*allowed, *[allowed[-1]] * len(theirs)]
    return max(
        abs(a - b) / (max(abs(b), 0.01) * limit)
        for a, b, limit in zip(ours, theirs, each, strict=False)
    )


def shapes(names: Mapping[str, Any]) -> dict[str, list[int]]:
    """The recorded names, one an entry {name: [layers, shape]} -> each with its shape."""
    return {
        name.replace("{}", str(n)): shape
        for name, (count, shape) in names.items()
        for n in range(count)
    }
