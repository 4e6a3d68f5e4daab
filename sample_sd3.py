"""Sample from Stable Diffusion 3 with a learned predictor: sample.py with SD3's presets."""

import runpy
import sys
from pathlib import Path

PRESETS = {
    "predictor": "sd3-512-best",
    "seeds": "0-3",
    "prompts_by": "order",
    "batch": 4,
    "outdir": "samples/sd3",
}
"""What sample.py's options are here unless they are given."""
MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
"""Where neither --model nor the predictor's recipe names one that is there."""


def main(arguments: list[str]) -> None:
    """Run sample.py: the i-th prompt of a file is for the i-th seed, and the rest is left.

    python sample_sd3.py --predictor sd3-1024-best --seeds 0-3 --prompt "a red fox in the snow"
    """
    sample = runpy.run_path(str(Path(__file__).resolve().with_name("sample.py")))["main"]
    sample.main(arguments, prog_name="sample_sd3.py", default_map=PRESETS, obj=MODEL)


if __name__ == "__main__":
    main(sys.argv[1:])
