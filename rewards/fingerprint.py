"""What a reward's scores hang on, as one hash: its code, its weights, its precision."""

import ast
import hashlib
import sysconfig
from importlib.machinery import PathFinder
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
    """SHA-256 of a module's source files: its own and those that it imports, see `sources`."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(module).items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def sources(module: str) -> dict[str, Path]:
    """The Python files that a module is made of, by the names of their modules.

    Imports are followed wherever they stand in the code, but not into what is installed (the
    standard library, site-packages). Nothing is imported or run.
    """
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        for name, path in modules_on(waiting.pop()).items():
            if name not in files:
                files[name] = path
                waiting += imported_by(path, name)
    return files


def modules_on(dotted: str) -> dict[str, Path]:
    """The modules on a dotted name, packages first; what follows them is a name in a module."""
    path, files, parts = None, {}, dotted.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        spec = PathFinder.find_spec(name, path)
        if spec is None or (spec.origin or "").startswith(INSTALLED):
            break
        if spec.origin and spec.origin.endswith(".py"):
            files[name] = Path(spec.origin)
        path = spec.submodule_search_locations
        if path is None:
            break
    return files


def imported_by(path: Path, name: str) -> list[str]:
    """The dotted names that a source file imports; [] where it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return []
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names
