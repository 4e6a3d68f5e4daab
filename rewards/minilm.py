"""all-MiniLM-L6-v2: sentences that mean alike get embeddings that lie close.

Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084. P prompts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.states import fill, read_state, renamed
from rewards.towers import half
from rewards.transformers_towers import library
from src.files import read_json

WEIGHTS = "model.safetensors"
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "position_ids")
LENGTH = 256  # tokens that are read


def load_minilm(
    folder: Path, device: torch.device, amp: bool = False
) -> Callable[[Sequence[str]], Tensor]:
    """-> P prompts -> embeddings [P, 384] of length 1: the mean over a sentence's tokens.

    ValueError, in one line, for a folder of another model.
    """
    content = read_json(folder / "config.json")
    if not isinstance(content, dict) or content.get("model_type") != "bert":
        raise ValueError(f"{folder / 'config.json'}: its model_type is not bert")
    config = library().BertConfig.from_dict(content)
    state = renamed(read_state(folder / WEIGHTS), {}, UNUSED)
    network = fill(
        lambda: library().BertModel(config, add_pooling_layer=False),
        state,
        str(folder / WEIGHTS),
        device,
    )
    tokens = library().BertTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def read(prompts: Sequence[str]) -> Tensor:
        told = tokens(
            list(prompts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(device)
        with half(device, amp):
            states = network(**told).last_hidden_state.float()
        present = told["attention_mask"][..., None]
        return F.normalize((states * present).sum(1) / present.sum(1), dim=-1)

    return read
