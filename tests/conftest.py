"""Set before any library is imported: no hub, one thread, the same examples each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ours")
