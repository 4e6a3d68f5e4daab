"""The text tower of an open_clip model as transformers' CLIPTextModelWithProjection.

Both are the causal transformer of Radford et al. 2021, arXiv:2103.00020; only names differ.
"""

from typing import Any

import transformers
from torch import Tensor

RENAMED = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def text_tower(clip: Any) -> transformers.CLIPTextModelWithProjection:
    """-> a copy of clip's text side, in eval mode: the same embeddings for the same tokens.

    clip is an open_clip.CLIP whose end-of-text token is its last and whose activation is GELU.
    """
    state = clip.state_dict()
    vocabulary, width = state["token_embedding.weight"].shape
    depth = len(clip.transformer.resblocks)
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        projection_dim=state["text_projection"].shape[1],
        num_hidden_layers=depth,
        num_attention_heads=clip.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=len(state["positional_embedding"]),
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    tower = transformers.CLIPTextModelWithProjection(config)
    tower.load_state_dict(_converted(state), strict=True)
    return tower.eval()


def _converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of open_clip -> those of transformers; q, k and v apart."""
    told = {new: state[old] for old, new in WHOLE.items()}
    told["text_projection.weight"] = state["text_projection"].T.contiguous()
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        _, _, layer, rest = name.split(".", 3)
        into = f"text_model.encoder.layers.{layer}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, share in zip("qkv", value.chunk(3), strict=True):
                told[f"{into}self_attn.{part}_proj.{kind}"] = share.contiguous()
            continue
        for old, new in RENAMED.items():
            if rest.startswith(old):
                told[into + new + rest.removeprefix(old)] = value
    return told
