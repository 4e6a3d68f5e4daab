"""Prompts as tensors, each distinct one embedded once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Prompt
from solvers.field import Condition
from src.text import read_prompts

Embedding: TypeAlias = dict[str, Tensor]
"""What a network is told for one prompt: tensors without the dimension of the batch."""

LOG = logging.getLogger(__name__)
USUAL = Path(__file__).resolve().parent.parent / "src" / "prompts" / "test.txt"


@dataclass
class Texts:
    """The text encoders, until they are let go, and what they made so far (on the CPU).

    Each text is encoded alone, so that its numbers do not depend on its company. `negative`
    is what guidance leads away from; None where the network knows no such thing.
    """

    encoder: Callable[[str], Embedding] | None
    device: torch.device
    negative: str | None = ""
    known: dict[str, Embedding] = field(default_factory=dict)

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Texts -> [B, ...] tensors, None being the empty text; ValueError for class numbers."""
        wrong = [p for p in prompts if not isinstance(p, str | None)]
        if wrong:
            raise ValueError(f"this model takes a text for every image, not {wrong[0]!r}")
        given = self.stacked([p if isinstance(p, str) else "" for p in prompts])
        if self.negative is None:
            return Condition(given)
        return Condition(given, self.stacked([self.negative] * len(prompts)))

    def stacked(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of these texts, one row each."""
        rows = [self.embedding(text) for text in texts]
        return {n: torch.stack([row[n] for row in rows]).to(self.device) for n in rows[0]}

    @torch.no_grad()
    def embedding(self, text: str) -> Embedding:
        """A text's embedding; ValueError for a new text when the encoders are gone."""
        if text not in self.known:
            if self.encoder is None:
                raise ValueError(f"the text encoders were let go before {text[:80]!r} was encoded")
            self.known[text] = {n: t.cpu() for n, t in self.encoder(text).items()}
        return self.known[text]

    def release(self, texts: Sequence[str]) -> None:
        """Encode these texts, and the negative one, and let go of the encoders."""
        for text in (*texts, *([] if self.negative is None else [self.negative])):
            self.embedding(text)
        self.encoder = None

    def at_once(self, texts: Sequence[str]) -> "Texts":
        """The same, its encoders let go of where there are texts to encode first."""
        if texts:
            self.release(texts)
        return self


def say_what_is_cut(text: str, *readers: tuple[Any, int]) -> None:
    """Log which end of a text is beyond what its encoders read.

    A reader is a tokenizer (or None) and the tokens that its encoder takes, marks included.
    """
    for tokenizer, limit in readers:
        tokens = tokenizer(text, truncation=False, verbose=False).input_ids if tokenizer else []
        if len(tokens) > limit:
            end = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True).strip()
            name = type(tokenizer).__name__.removesuffix("Fast").removesuffix("Tokenizer")
            LOG.warning("the prompt %r is too long: %s does not read %r", text[:40], name, end)


def usual_text(seed: int) -> str:
    """A prompt of src/prompts/test.txt, by the seed."""
    prompts = read_prompts(USUAL)
    return prompts[seed % len(prompts)]
