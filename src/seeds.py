"""Seeds, and noise that hangs on a sample's seed alone.

B samples. A stream is the purpose of the noise: 0 for the first latents, any other int or
string (`"churn/3"`, `"class"`) for something independent of them.
"""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**63 - 1
MAX_COUNT = 10_000_000
FORM = 'write numbers and ranges, such as "0-63,100"'


def parse_seeds(text: str) -> list[int]:
    """`"0-63,100"` -> [0, ..., 63, 100], in the order given; ranges include both ends.

    ValueError, naming the part, for an empty list, a range that falls, negative, repeated and
    huge seeds (above 2^63 - 1), and anything else that is neither a number nor a range.
    """
    if not text.strip():
        raise ValueError(f"the seed list is empty: {FORM}")
    seeds: dict[int, None] = {}
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"([0-9]{1,40})(?:\s*-\s*([0-9]{1,40}))?", part)
        if match is None:
            raise ValueError(f"'{part[:80]}' is no seed or range of seeds: {FORM}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the seed range '{part}' falls: write '{last}-{first}'")
        if last > MAX_SEED:
            raise ValueError(f"seed {last} is too large: the largest is 2^63 - 1")
        if last - first + len(seeds) >= MAX_COUNT:
            raise ValueError(f"seeds '{part}' make more than {MAX_COUNT} samples")
        for seed in range(first, last + 1):
            if seed in seeds:
                raise ValueError(f"seed {seed} of '{part}' is there twice: drop one")
            seeds[seed] = None
    return list(seeds)


def generator(seed: int, stream: int | str = 0) -> torch.Generator:
    """A CPU generator for one sample and one purpose.

    Stream 0 below 2^32 is `manual_seed(seed)`, the numbers that others know a seed by. torch's
    CPU generator reads no more than 32 bits of its seed, so larger seeds and the other streams
    go through a hash: two of them meet by chance, once in 2^32, and never by pattern.
    """
    if stream != 0 or seed >= 2**32:
        digest = hashlib.blake2b(f"{seed}/{stream!r}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "big")
    return torch.Generator().manual_seed(seed)


def randn(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    stream: int | str = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [B, *shape], row i from seeds[i] alone.

    Drawn in float32 on the CPU, then cast and moved: the batch, the rank, the device and the
    dtype do not change the picture that a seed stands for.
    """
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator(seed, stream))
    return noise.to(device, dtype)


def randint(seeds: Sequence[int], high: int, *, stream: int | str) -> Tensor:
    """Integers [B] in 0, ..., high - 1, row i from seeds[i] alone (a random class, say)."""
    draws = (torch.randint(high, (), generator=generator(s, stream)) for s in seeds)
    return torch.tensor([int(d) for d in draws], dtype=torch.int64)
