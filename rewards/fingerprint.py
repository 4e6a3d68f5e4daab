"""What a reward's scores hang on, as one hash: its code, its weights, its precision."""

import ast
import hashlib
import sys
import sysconfig
from pathlib import Path

from rewards.registry import ADAPTERS, Setup, files_of, singles
from rewards.weights import sha256

ROOT = Path(__file__).parents[1]
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def fingerprint(name: str, setup: Setup | None = None) -> str:
    """A hash that changes whenever scores of this reward may change; keep scores under it.

    name: as `load_rewards` takes it, sums and `module:function` included. It covers the source
    files of the reward, with all that they import and that is not installed; path, size and
    time of the files of weights; and whether half precision is on. What files a function of
    your own reads is not seen. Raises ValueError as `load_rewards` does for missing weights.
    """
    setup = setup or Setup()
    parts: list[object] = [name, setup.amp]
    for one in singles([name]):
        own = ADAPTERS[one].load if one in ADAPTERS else one
        parts.append(source_hash(own.partition(":")[0]))
        if one in ADAPTERS and ADAPTERS[one].shipped:
            parts.append(sha256(ROOT / ADAPTERS[one].shipped))
    for weights, path in sorted(files_of([name], setup.paths).items()):
        parts.append((weights, stamp(path)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of a file, or of each file in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def source_hash(module: str) -> str:
    """SHA-256 of a module's source files, see `sources`."""
    content = [(name, sha256(path)) for name, path in sorted(sources(module).items())]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def sources(module: str) -> dict[str, Path]:
    """The Python files of a module and of all that it imports, by the names of their modules.

    Imports are followed wherever they stand in the code, but not into what is installed (the
    standard library, site-packages). Nothing is imported or run.
    """
    roots = [Path(p) for p in sys.path if not p.startswith(INSTALLED)]
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        for count in range(1, len(parts) + 1):  # packages first; a name in a module is no file
            name, place = ".".join(parts[:count]), Path(*parts[:count])
            tried = [root / p for root in roots for p in (place / "__init__.py", f"{place}.py")]
            path = next((path for path in tried if path.is_file()), None)
            if path and name not in files:
                files[name] = path
                waiting += _imports(path, name)
    return files


def _imports(path: Path, name: str) -> list[str]:
    """The dotted names that a source file imports; [] where it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return []
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            inner = node.level - (path.name == "__init__.py")  # packages that a dot goes up
            up = name.split(".")[: -inner or None] if node.level else []
            base = [*up, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names
