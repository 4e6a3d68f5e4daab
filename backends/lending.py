"""A pipeline with other parts for a while: its scheduler, its latents, prompts encoded once."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
PLAIN = (str, int, float, type(None), torch.device, torch.dtype)
ADAPTERS = ("scaling", "merged_adapters", "_active_adapter", "_disable_adapters", "_lora_scale")
"""What peft's and diffusers' LoRA layers hold apart from their weights."""
OF_PROMPTS_ALONE = ("clip_skip", "complex_human_instruction")
"""Arguments of encode_prompt that no pipeline heeds for its negative prompts."""
MOST_PROMPTS = 256
LOOKED_AT = 4096  # numbers of a tensor, evenly
LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class LengthsDiffer(Exception):
    """Raised where texts together give other embeddings than one by one, as they are padded."""


def lock_of(pipe: Any) -> Any:
    """The lock of a pipeline: while it has parts of ours, other threads' calls of ours wait."""
    return LOCKS.setdefault(pipe, RLock())


@contextmanager
def lent(pipe: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """A pipeline with these attributes, and as it was afterwards.

    Without its own `__setattr__`, which would write their classes into its config for good.
    """
    own = vars(pipe) if attributes else {}  # some have no such part
    before = {name: own[name] for name in attributes if name in own}
    try:
        own.update(attributes)
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def with_latents(
    prepare: Callable[..., Any],
    before: Callable[[dict[str, Any]], None],
    after: Callable[[Tensor, list[Any]], list[Any]],
) -> Callable[..., Any]:
    """A pipeline's prepare_latents: `before` may change its arguments, `after` what it returns."""
    signature = inspect.signature(prepare)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        before(bound.arguments)
        result = prepare(*bound.args, **bound.kwargs)
        latents, *others = result if isinstance(result, tuple | list) else (result,)
        results = after(latents, others)
        return type(result)(results) if isinstance(result, tuple | list) else results[0]

    return prepared


@dataclass
class CachedPrompts:
    """A pipeline's encode_prompt that encodes each distinct text once, alone where it can be.

    The copies of a prompt stand side by side in all that it gives: some pipelines (LTX, Mochi,
    Sana, Lumina2) lay masks out in another order. Results are kept while the text encoders are
    the same: their weights, their adapters, the tokenizers' words. With `apart`, texts that
    cannot be put together so raise LengthsDiffer, where else they are encoded together.
    """

    pipe: Any
    apart: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    encoders: Any = None
    negatives: int = 0  # how many of the texts, the last ones, are negative prompts

    def installed(self) -> Callable[..., Any]:
        """What takes the place of the pipeline's encode_prompt for a call of the pipeline."""
        encode, encoders = self.pipe.encode_prompt, state_of_encoders(self.pipe)
        if encoders is None or encoders != self.encoders or len(self.results) > MOST_PROMPTS:
            self.results.clear()
        self.encoders = encoders
        signature = inspect.signature(encode)

        def recall(arguments: dict[str, Any]) -> Any:
            key = repr(sorted(arguments.items()))
            if key not in self.results:
                self.results[key] = encode(**arguments)
            return copied(self.results[key])  # callbacks edit them in place

        def encoded(*args: Any, **kwargs: Any) -> Any:
            given = bound(signature, args, kwargs)
            counts = [name for name in COUNTS if name in given]
            copies = given[counts[0]] if counts else 1
            given |= dict.fromkeys(counts, 1)
            embeds, texts = given.get("prompt_embeds"), given.get("prompt")
            one = isinstance(texts, str)
            none = given.get("batch_size", 0)  # rows of an empty text, where there is no prompt
            rows = len(embeds) if embeds is not None else 1 if one else len(texts or "") or none
            if texts is None or not all(map(is_plain, given.values())):
                result = encode(**given)
            elif one:
                result = recall(given)
            else:
                lists = {n: given[n] for n in texts_in(given) if isinstance(given[n], list)}
                lists = {n: v for n, v in lists.items() if len(v) == rows}
                each = [given | {n: [v[i]] for n, v in lists.items()} for i in range(rows)]
                for negative in each[rows - self.negatives :]:
                    negative |= {n: None for n in OF_PROMPTS_ALONE if n in negative}
                result = joined([recall(one) for one in each])
                if result is None and self.apart and any(one != each[0] for one in each):
                    raise LengthsDiffer
            if result is None or (one and any(map(is_layered, result))):
                return recall(given | copies_of(given, copies))

            def of_each(value: Any) -> Any:
                if copies == 1 or not isinstance(value, Tensor | list) or len(value) != rows:
                    return value
                return repeated(value, copies)

            return tuple(map(of_each, result)) if isinstance(result, tuple) else of_each(result)

        return encoded


def bound(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those of a `**kwargs` among the others."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    others = (n for n, p in signature.parameters.items() if p.kind == p.VAR_KEYWORD)
    return given | {k: v for name in others for k, v in given.pop(name, {}).items()}


def repeated(rows: Any, copies: int) -> Any:
    """The rows of a tensor or a list, so many of each side by side."""
    if isinstance(rows, Tensor):
        return rows.repeat_interleave(copies, 0)
    return [row for row in rows for _ in range(copies)]


def copied(value: Any) -> Any:
    """The same tensors, in lists and tuples too, in memory of their own."""
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def texts_in(given: Mapping[str, Any]) -> list[str]:
    """The names of the texts among the arguments of encode_prompt."""
    return [n for n in given if n.removeprefix("negative_").rstrip("_234") == "prompt"]


def is_layered(value: Any) -> bool:
    """Whether what a text gave has layers before its row, as HiDream's has, and Bria FIBO's."""
    large = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 3)
    return large and len(value) > 1


def copies_of(given: dict[str, Any], copies: int) -> dict[str, Any]:
    """The texts among the arguments of encode_prompt, so many of each side by side.

    One text beside a list of prompts is for all of them, and stays one.
    """
    names = texts_in(given)
    one = isinstance(given["prompt"], str)
    texts = {n: [given[n]] if one and isinstance(given[n], str) else given[n] for n in names}
    return {n: repeated(v, copies) for n, v in texts.items() if isinstance(v, list | tuple)}


def is_plain(value: Any) -> bool:
    """Whether two such values are the same where they are written alike."""
    return all(isinstance(v, PLAIN) for v in (value if isinstance(value, list) else [value]))


def state_of_encoders(pipe: Any) -> Any:
    """All that embeddings depend on besides their texts; None where that cannot be read."""
    parts = {n: p for n, p in pipe.components.items() if n.startswith(("text_enc", "tokenizer"))}
    networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    tensors = [t for network in networks for t in network.parameters() if t.numel()]
    if any(t.is_meta or t.is_inference() for t in tensors):
        return None
    layers = [vars(layer) for network in networks for layer in network.modules()]
    adapters = [repr([own[name] for name in ADAPTERS if name in own]) for own in layers]
    named = [part for n, part in parts.items() if n.startswith("tokenizer")]
    tokenizers = [getattr(part, "tokenizer", part) for part in named]  # of a processor, its own
    words = [len(part) if isinstance(part, Sized) else None for part in tokenizers]
    # which tensor, how often it was changed in place, and a sum, as `.data` is not counted
    versions = [(id(t), t._version, t.dtype) for t in tensors]
    sums = dict[torch.device, list[Tensor]]()
    for t in tensors:
        some = t.detach().reshape(-1)[:: -(-t.numel() // LOOKED_AT)]
        sums.setdefault(t.device, []).append(some.float().sum())
    numbers = [torch.stack(each).tolist() for each in sums.values()]  # one wait each
    own = {n: v for n, v in vars(pipe).items() if n[:1] != "_" and is_plain(v)}  # templates
    return [id(part) for part in parts.values()], adapters, words, versions, numbers, own


def joined(parts: list[Any]) -> Any:
    """What texts gave one by one as what they give together; None where that is not the same."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tuple):
        columns = [joined(list(column)) for column in zip(*parts, strict=True)]
        absent = [c is None and p is not None for c, p in zip(columns, parts[0], strict=True)]
        return None if any(absent) else tuple(columns)
    if isinstance(parts[0], list):
        rows = [row for part in parts for row in part]
        return rows if len(rows) == len(parts) else None  # else they are layers
    if not all(isinstance(part, Tensor) and part.shape == parts[0].shape for part in parts):
        return None
    if len(parts[0]) == 1:
        return torch.cat(parts)
    same = parts[0].ndim == 2 and all(torch.equal(part, parts[0]) for part in parts)
    return parts[0] if same else None  # FLUX's places of tokens are those of every text
