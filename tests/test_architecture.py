"""The rules of the house that the linters cannot hold, read off the source.

Who may import whom is import-linter's, in pyproject.toml.
"""

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "solvers", "backends", "rewards", "training", "eval", "exps")
HEAVY = {"diffusers", "transformers", "open_clip", "hpsv2", "ImageReward"}
ON_HEAVY = {"backends.drop_in", "backends.hooks", "backends.parallel"}
ON_HEAVY |= {f"rewards.{name}" for name in ("efficientnet_minilm", "imagereward", "mps")}
"""They stand on modules that import those."""
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
LONGEST = 500  # lines of a file


@dataclass(frozen=True)
class Module:
    """A Python file: its place in the repository, its text, its tree."""

    path: Path
    text: str

    @property
    def module(self) -> str:
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def imports(self) -> set[str]:
        """The packages that it imports from."""
        names = [a.name for n in self.nodes if isinstance(n, ast.Import) for a in n.names]
        names += [str(n.module) for n in self.nodes if isinstance(n, ast.ImportFrom)]
        return {name.split(".")[0] for name in names}

    @cached_property
    def calls(self) -> list[tuple[str, dict[str | None, str]]]:
        """Each call by its dotted name, with its keywords."""
        return [
            (ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords})
            for n in self.nodes
            if isinstance(n, ast.Call)
        ]


SCRIPTS = sorted(ROOT.glob("*.py"))
FILES = [*SCRIPTS, *(path for top in FOLDERS for path in sorted((ROOT / top).rglob("*.py")))]
OURS = [Module(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in FILES]
CLASSES = [n for s in OURS for n in s.nodes if isinstance(n, ast.ClassDef)]


def offenders(wrong: Callable[[Module], object]) -> dict[str, object]:
    results = {str(source.path): wrong(source) for source in OURS}
    return {path: what for path, what in results.items() if what}


def test_files_are_there_none_is_endless_and_no_two_and_no_two_classes_have_one_name() -> None:
    assert {"solvers.epd", "src.seeds", "backends.base"} <= {source.module for source in OURS}
    assert offenders(lambda s: s.text.count("\n") > LONGEST) == {}
    tests = [Module(p, p.read_text(encoding="utf-8")) for p in sorted(ROOT.glob("tests/**/*.py"))]
    tree = [*OURS, *tests]
    classes = [n.name for s in tree for n in s.nodes if isinstance(n, ast.ClassDef)]
    files = [s.path.name for s in tree if s.path.name not in ("base.py", "__init__.py")]
    assert not {name for name in classes if classes.count(name) > 1}
    assert len(files) == len(set(files))
    for top in FOLDERS[:-1]:
        assert ast.get_docstring(ast.parse((ROOT / top / "__init__.py").read_text())), top
    for name in ("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert (ROOT / name).stat().st_size > 100


def test_nobody_imports_a_script() -> None:
    scripts = {path.stem for path in SCRIPTS} | {"tests"}
    assert offenders(lambda s: s.imports & scripts) == {}


def test_everything_is_imported_without_the_model_libraries() -> None:
    packaged = [s for s in OURS if (ROOT / s.path.parent / "__init__.py").exists()]
    light = [s for s in packaged if not s.imports & HEAVY and s.path.stem != "__main__"]
    light = [s for s in light if s.module not in ON_HEAVY]
    code = f"""
import importlib, sys
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None
for name in {[s.module for s in light]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_nothing_is_unpickled_by_pickle_but_by_the_reader_that_runs_nothing() -> None:
    loads = {"pickle.load", "pickle.loads", "joblib.load", "dill.load"}

    def wrong(source: Module) -> list[str]:
        blind = [
            n for n, k in source.calls if n == "torch.load" and k.get("weights_only") != "True"
        ]
        readers = "pickle.Unpickler" in source.text and source.module != "src.pickles"
        return [n for n, _ in source.calls if n in loads] + blind + ["Unpickler"] * readers

    assert offenders(wrong) == {}


def test_no_random_number_comes_from_a_global_generator() -> None:
    """But in builds, each a process of its own that makes weights."""

    def wrong(source: Module) -> list[str]:
        if source.path.parts[:2] == ("exps", "build"):
            return []
        names = []
        for name, keywords in source.calls:
            module, _, function = name.rpartition(".")
            drawn = module == "torch" and function in DRAWS and "generator" not in keywords
            like = function in ("rand_like", "randn_like", "manual_seed_all")
            if drawn or like or name in ("torch.manual_seed", "np.random.seed", "random.seed"):
                names.append(name)
        return names

    assert offenders(wrong) == {}


def test_no_object_is_asked_what_it_has_and_no_function_takes_what_it_does_not_name() -> None:
    """But for a wrapper, which hands on what it gets, and a click command with its options."""
    assert offenders(lambda s: [name for name, _ in s.calls if name == "hasattr"]) == {}

    def wrong(source: Module) -> list[str]:
        return [
            node.name
            for node in source.nodes
            if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.args.vararg
            if not any("click" in ast.unparse(d) for d in node.decorator_list)
        ]

    assert offenders(wrong) == {}


def test_our_classes_do_not_inherit_from_each_other() -> None:
    concrete = {c.name for c in CLASSES if "Protocol" not in map(ast.unparse, c.bases)}
    bases = [(c.name, ast.unparse(base)) for c in CLASSES for base in c.bases]
    assert not [
        (name, base)
        for name, base in bases
        if base.rpartition(".")[2].split("[")[0] in concrete and not base.startswith("nn.")
    ]
