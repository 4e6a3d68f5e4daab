"""Hooks by which a pipeline's network sees fewer rows than its batch, or each row's guidance."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backends.lending import repeated
from backends.scheduler import EPDScheduler
from backends.spread import SharedRows

PLACES = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis")  # arguments without rows


def run_once(network: torch.nn.Module, scheduler: EPDScheduler) -> list[Any]:
    """Hooks by which a network sees one of an image's rows where they are alike."""
    copies = scheduler.copies
    return fewer_rows(
        network,
        lambda: scheduler.running.alike,
        lambda rows: rows[::copies],
        lambda rows, _count: repeated(rows, copies),
    )


def given_alone(network: torch.nn.Module, scheduler: EPDScheduler) -> list[Any]:
    """Hooks by which a network sees no rows of the negative prompt in calls without guidance."""

    def twice(rows: Any, _count: int) -> Any:
        return torch.cat([rows, rows]) if isinstance(rows, Tensor) else [*rows, *rows]

    return fewer_rows(
        network, lambda: scheduler.running.unguided, lambda rows: rows[: len(rows) // 2], twice
    )


def tell_guidance(network: torch.nn.Module, scheduler: EPDScheduler) -> Any:
    """A hook by which a network is told each point's rate, times the pipeline's own."""

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        rates = (own := kwargs["guidance"]).new_tensor(scheduler.running.now.rates or (1.0,))
        return args, kwargs | {"guidance": own * rates.repeat(len(own) // len(rates))}

    hook: Any = torch.compiler.disable(before)  # a step is no constant of what is compiled
    return network.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def share(network: torch.nn.Module, mesh: DeviceMesh) -> list[Any]:
    """Hooks by which the ranks of the mesh's `points` share a network's rows."""
    ranks = SharedRows(mesh.get_group("points"))

    def all_of(value: Any, count: int) -> Any:
        if isinstance(value, list):
            return list(ranks.all_of(torch.stack(value), count))
        return ranks.all_of(value, count)

    return fewer_rows(network, lambda: True, ranks.own, all_of)


def fewer_rows(
    network: torch.nn.Module,
    when: Callable[[], bool],
    pick: Callable[[Any], Any],
    restore: Callable[[Any, int], Any],
) -> list[Any]:
    """Hooks by which a network sees some of its rows, tensors or lists, and answers for all.

    Those of a later call of this are around those of an earlier one.
    """
    rows = [0]  # of the call, 0 where it sees all

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        rows[0] = len(first) if when() else 0
        if not rows[0]:
            return None
        thin = partial(thinned, rows=rows[0], pick=pick, listed=isinstance(first, list))
        return thin(args), thin(kwargs)

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if not rows[0]:
            return None
        if isinstance(output, tuple):
            return (restore(output[0], rows[0]), *output[1:])
        return replace(output, sample=restore(output.sample, rows[0]))

    # a step is no constant of what is compiled
    hooks: list[Any] = [torch.compiler.disable(hook) for hook in (before, after)]
    handles = [network.register_forward_pre_hook(hooks[0], with_kwargs=True, prepend=True)]
    return [*handles, network.register_forward_hook(hooks[1])]


def thinned(value: Any, *, rows: int, pick: Callable[[Any], Any], listed: bool) -> Any:
    """Arguments of a network with some of their rows, at any depth."""
    thin = partial(thinned, rows=rows, pick=pick, listed=listed)
    if isinstance(value, Tensor):
        return pick(value) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: v if name in PLACES else thin(v) for name, v in value.items()}
    if listed and isinstance(value, list) and len(value) == rows:
        return pick(value)
    return type(value)(map(thin, value)) if isinstance(value, list | tuple) else value
