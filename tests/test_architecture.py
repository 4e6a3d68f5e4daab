"""The rules of the house that the linters cannot hold, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "src": set(),
    "solvers": {"src"},
    "backends": {"solvers", "src"},
    "rewards": {"solvers", "src"},
    "training": {"backends", "rewards", "solvers", "src"},
    "eval": {"backends", "rewards", "solvers", "src"},
}
"""What each folder may import besides itself; scripts may import all."""
HEAVY = {"diffusers", "transformers", "open_clip", "hpsv2", "ImageReward"}
PROTOCOLS = {"backends.base", "backends.generate", "rewards.base"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}


@dataclass(frozen=True)
class Source:
    """A Python file: its place in the repository, its dotted name ("" for a script), its tree."""

    path: Path
    module: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.module.split(".")[0]

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(self.tree)

    def imports(self) -> set[str]:
        """Dotted names, `from a import b` as a.b, since b may be a module."""
        names: set[str] = set()
        for node in self.nodes():
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        return names


def read(path: Path) -> Source:
    place = path.relative_to(ROOT)
    parents = [ROOT.joinpath(*place.parts[: i + 1]) for i in range(len(place.parts) - 1)]
    packaged = bool(parents) and all((p / "__init__.py").exists() for p in parents)
    name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
    return Source(place, name if packaged else "", ast.parse(path.read_text(encoding="utf-8")))


OURS = [
    read(path)
    for top in (*BELOW, "exps")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
] + [read(path) for path in sorted(ROOT.glob("*.py"))]
LIBRARY = [source for source in OURS if source.module]


def offenders(sources: list[Source], wrong: Callable[[Source], object]) -> dict[str, object]:
    found = {str(source.path): wrong(source) for source in sources}
    return {path: what for path, what in found.items() if what}


def calls(source: Source) -> Iterator[tuple[str, set[str | None], ast.Call]]:
    """Each call as its dotted name, the names of its keywords, and its node."""
    for node in source.nodes():
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg for k in node.keywords}, node


def test_the_files_are_found() -> None:
    assert {"solvers.epd", "src.seeds", "backends.base"} <= {s.module for s in LIBRARY}


def test_no_folder_imports_a_layer_above_or_beside_it() -> None:
    def wrong(source: Source) -> set[str]:
        tops = {name.split(".")[0] for name in source.imports()} & BELOW.keys()
        return tops - BELOW[source.folder] - {source.folder}

    assert offenders(LIBRARY, wrong) == {}


def test_the_mathematics_imports_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "solvers", *sys.stdlib_module_names}
    of_files = {"solvers/predictor.py", "solvers/published.py", "solvers/persistence.py"}

    def wrong(source: Source) -> set[str]:
        tops = {name.split(".")[0] for name in source.imports()} - allowed
        return tops - {"src"} if source.path.as_posix() in of_files else tops

    assert offenders([s for s in LIBRARY if s.folder == "solvers"], wrong) == {}


def test_nobody_imports_a_script() -> None:
    scripts = {s.path.stem for s in OURS if len(s.path.parts) == 1} | {"exps", "tests"}

    def wrong(source: Source) -> set[str]:
        return {name.split(".")[0] for name in source.imports()} & scripts

    assert offenders(OURS, wrong) == {}


def test_model_libraries_are_met_in_backends_and_rewards_alone() -> None:
    def wrong(source: Source) -> set[str]:
        return {name.split(".")[0] for name in source.imports()} & HEAVY

    assert offenders([s for s in OURS if s.folder not in ("backends", "rewards")], wrong) == {}


def test_training_sees_protocols_and_no_network_or_reward() -> None:
    def wrong(source: Source) -> set[str]:
        names = {n for n in source.imports() if n.split(".")[0] in ("backends", "rewards")}
        return {n for n in names if n not in PROTOCOLS and n.rpartition(".")[0] not in PROTOCOLS}

    training = [s for s in LIBRARY if s.folder == "training"]
    assert offenders([s for s in training if s.module != "training.ppo.launch"], wrong) == {}


def test_imports_are_absolute() -> None:
    def wrong(source: Source) -> bool:
        return any(isinstance(n, ast.ImportFrom) and n.level for n in source.nodes())

    assert offenders(OURS, wrong) == {}


def test_everything_is_imported_without_the_model_libraries() -> None:
    def meets(source: Source) -> bool:
        return any(name.split(".")[0] in HEAVY for name in source.imports())

    light = [s.module for s in LIBRARY if not meets(s) and s.path.stem != "__main__"]
    code = f"""
import importlib, sys
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None
for name in {light!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_nothing_is_unpickled_by_pickle() -> None:
    def wrong(source: Source) -> list[str]:
        loads = {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"}
        return [
            ast.unparse(node)
            for name, _, node in calls(source)
            if name in loads or (name == "torch.load" and not _weights_only(node))
        ]

    assert offenders(OURS, wrong) == {}


def _weights_only(node: ast.Call) -> bool:
    values = {k.arg: ast.unparse(k.value) for k in node.keywords}
    return values.get("weights_only") == "True"


def test_no_random_number_comes_from_a_global_generator() -> None:
    def wrong(source: Source) -> list[str]:
        found = []
        for name, keywords, node in calls(source):
            module, _, function = name.rpartition(".")
            seeded = "generator" in keywords
            drawn = module == "torch" and function in DRAWS and not seeded
            like = function in ("rand_like", "randn_like", "manual_seed_all")
            if drawn or like or name in ("torch.manual_seed", "np.random.seed", "random.seed"):
                found.append(ast.unparse(node))
        return found

    assert offenders(OURS, wrong) == {}


def test_no_object_is_asked_what_it_has() -> None:
    assert offenders(OURS, lambda s: [n for n, _, _ in calls(s) if n == "hasattr"]) == {}


def test_no_function_takes_arguments_that_it_does_not_name() -> None:
    def wrong(source: Source) -> list[str]:
        return [
            node.name
            for node in source.nodes()
            if isinstance(node, ast.FunctionDef)
            and node.args.kwarg
            and not node.args.vararg  # both: a wrapper, which hands on what it gets
        ]

    assert offenders(LIBRARY, wrong) == {}  # a script's command may take click's options so


def test_our_classes_do_not_inherit_from_each_other() -> None:
    classes = [n for s in OURS for n in s.nodes() if isinstance(n, ast.ClassDef)]
    concrete = {c.name for c in classes if "Protocol" not in map(ast.unparse, c.bases)}

    def wrong(source: Source) -> list[str]:
        return [
            f"{node.name}({base})"
            for node in source.nodes()
            if isinstance(node, ast.ClassDef)
            for base in map(ast.unparse, node.bases)
            if base.rpartition(".")[2].split("[")[0] in concrete and not base.startswith("nn.")
        ]

    assert offenders(OURS, wrong) == {}


def test_every_package_says_what_it_is_in_a_line() -> None:
    packages = [s for s in LIBRARY if s.path.name == "__init__.py"]
    assert {s.module for s in packages} >= BELOW.keys()
    assert offenders(packages, lambda s: not ast.get_docstring(s.tree)) == {}


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_papers_of_the_house_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100
