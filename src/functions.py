"""Functions of one's own, and what commands call them: module:function."""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def own_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; ValueError where it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        own = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    if not callable(own):
        raise ValueError(f"{name!r} is no function, but of type {type(own).__name__}")
    return own


def name_of(function: Any) -> str:
    """What commands call a function, module:function, or module:class; its own `name` if it has.

    Without what wraps it: partials, decorators, methods, compiled modules.
    """
    while (inner := unwrapped(function)) is not function:
        function = inner
    if isinstance(getattr(function, "name", None), str):
        return function.name
    named = function if inspect.isroutine(function) else type(function)
    script = getattr(sys.modules["__main__"], "__file__", None)
    module = Path(script).stem if script and named.__module__ == "__main__" else named.__module__
    return f"{module}:{named.__qualname__}"


def unwrapped(function: Any) -> Any:
    """What a function wraps, or itself."""
    if isinstance(function, partial):
        return function.func
    ways = ("__func__", "__wrapped__", "_orig_mod")
    return next((own for way in ways if (own := getattr(function, way, None))), function)
