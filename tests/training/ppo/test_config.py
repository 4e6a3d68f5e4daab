import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from solvers.predictor import find_predictor, load_predictor
from solvers.recipe import Recipe
from src.text import read_prompts
from training.ppo.config import Config, load_config, resolved, to_yaml

FOLDER = Path(__file__).parents[3] / "training" / "ppo"
CFGS = sorted((FOLDER / "cfgs").glob("*.yaml"))
SD3 = FOLDER / "cfgs" / "sd3_512.yaml"
PUBLISHED = ("sd15", "sd3_512", "sd3_1024", "flux_dev")


def recipe(config: Config) -> Recipe:
    return load_predictor(find_predictor(config.data.predictor_snapshot)).recipe


def read(path: Path, overrides: Sequence[str] = ()) -> Config:
    config = load_config(path, overrides)
    return resolved(config, recipe(config))


@pytest.mark.parametrize("path", CFGS, ids=lambda path: path.stem)
def test_a_file_is_whole_reads_back_as_it_was_and_has_the_published_values(
    path: Path, tmp_path: Path
) -> None:
    written: Any = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    assert {"data", "model", "reward", "ppo", "logging", "run"} == written.keys()
    config = load_config(path)
    ppo, trained = config.ppo, set(read_prompts(str(config.data.prompt_csv)))
    held_out = config.data.heldout_prompts  # None: taken out of the others
    if held_out not in (None, config.data.prompt_csv):  # of classes noises are held out
        assert trained.isdisjoint(read_prompts(held_out))
    assert len(dataclasses.asdict(ppo)) >= len(written["ppo"]) >= 20
    config = resolved(config, recipe(config))
    assert config.model.backend == recipe(config).backend
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    if path.stem in PUBLISHED:
        assert (ppo.rloo_k, ppo.ppo_epochs, ppo.minibatch_size) == (4, 1, 4)
        assert (ppo.learning_rate, ppo.clip_range, ppo.max_grad_norm) == (7e-5, 0.2, 1)
        assert (ppo.kl_coef, ppo.entropy_coef, ppo.grouping) == (0, 0, "crn")
        assert (ppo.method, ppo.baseline, ppo.train_guidance) == ("ppo", "rloo", False)
        assert ppo.dirichlet_concentration == (20 if path.stem == "sd15" else 10)
        assert ppo.rollout_batch_size == (16 if path.stem == "sd3_512" else 8)


AS_PUBLISHED = """
data: {predictor_snapshot: exps/flux/flux-best.pkl, prompt_csv: null}
model:
  dataset_name: ms_coco
  guidance_type: cfg
  guidance_rate: 3.5
  schedule_type: flowmatch
  schedule_rho: 1.0
  num_steps: 9
  num_points: 2
  backend: flux
  backend_options: {model_id: /my/flux, torch_dtype: bfloat16, enable_model_cpu_offload: true,
                    resolution: 1024, flowmatch_mu: 1.15, flowmatch_shift: 3.0}
reward:
  {type: hps, multi: {weights: {hps: 1.0}}, batch_size: 4, weights_path: null, enable_amp: true}
ppo: {rollout_batch_size: 8, rloo_k: 4, minibatch_size: 4, decode_rgb: true}
logging: {log_interval: 1, save_interval: 50}
run: {output_root: exps, run_name: flux, seed: 0}
"""


def test_the_published_layout_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(AS_PUBLISHED)
    config = read(tmp_path / "c.yaml")
    assert (config.model.model, config.model.resolution) == ("/my/flux", 1024)
    options = config.model.backend_options
    assert (options.dtype, options.cpu_offload) == ("bfloat16", True)
    assert config.data.prompt_csv == "src/prompts/train.txt"
    assert config.reward.name == "hps"
    assert read(tmp_path / "c.yaml", ["model.model=null"]).model.model == "/my/flux"
    (tmp_path / "ours.yaml").write_text(to_yaml(read(tmp_path / "c.yaml", ["model.model=/a"])))
    options = ("model_name_or_path=/other", "torch_dtype=float32", "resolution=256")
    changes = [f"model.backend_options.{option}" for option in options]
    changed = load_config(tmp_path / "ours.yaml", changes).model
    assert (changed.model, changed.resolution) == ("/other", 256)
    assert changed.backend_options.dtype == "float32"


REFUSED = {
    "ppo.learnin_rate=1": "'ppo.learnin_rate': did you mean ppo.learning_rate?",
    "pp.steps=3": "'pp': did you mean ppo?",
    "model.backend_options.dtyp=x": "did you mean model.backend_options.dtype?",
    "reward.weight_path=x": "did you mean reward.weights_path?",
    "ppo=3": "is not section.key=value",
    "ppo.steps": "is not section.key=value",
    "ppo.steps=[": "cannot be read",
    "reward.multi=3": "reward.multi 3 is no section: it has the keys weights",
    "ppo.steps=1.5": "ppo.steps is '1.5', where int belongs",
    "ppo.steps=true": "ppo.steps is 'True', where int belongs",
    "ppo.steps=null": "ppo.steps is 'None', where int belongs",
    "ppo.clip_range=wide": "ppo.clip_range is 'wide', where float belongs",
    "logging.tensorboard=maybe": "logging.tensorboard is 'maybe', where bool belongs",
    "reward.judges=clip": "reward.judges is 'clip', where list belongs",
    "reward.judges=[1]": "reward.judges is '1', where str belongs",
    "reward.multi.weights={hps: x}": "reward.multi.weights.hps is 'x', where float belongs",
    "data.predictor_snapshot=null": "data.predictor_snapshot is 'None', where str belongs",
    "reward.weights_path=[1]": "reward.weights_path is '[1]', where str or dict or null belongs",
    "ppo.clip_range=${ppo.nothing}": "ppo.clip_range",
    "ppo.clip_range=.nan": "ppo.clip_range nan is out of range: above 0, 1 at most",
    "ppo.learning_rate=.inf": "ppo.learning_rate inf is out of range",
    "ppo.learning_rate=0": "ppo.learning_rate 0.0 is out of range: above 0",
    "ppo.steps=0": "ppo.steps 0 is out of range: 1 or more",
    "ppo.kl_coef=-1": "ppo.kl_coef -1.0 is out of range: 0 or more",
    "ppo.entropy_by_interval=[1, -1]": "ppo.entropy_by_interval -1.0 is out of range",
    "run.seed=-1": "run.seed -1 is out of range",
    "model.guidance_rate=.nan": "model.guidance_rate nan is out of range",
    "ppo.grouping=crm": "unknown ppo.grouping 'crm': did you mean crn?",
    "ppo.method=cmaes": "unknown ppo.method 'cmaes': did you mean cma?",
    "ppo.baseline=james": "unknown ppo.baseline 'james': did you mean james-stein?",
    "model.model=''": "model.model is empty",
    "run.run_name='a/b'": "run.run_name 'a/b' cannot name a folder",
    "ppo.rloo_k=3": "ppo.rloo_k 3 does not divide ppo.rollout_batch_size 16",
    "ppo.minibatch_size=5": "set ppo.rollout_batch_size=20",
    "ppo.decode_rgb=false": "every reward looks at decoded images",
    "ppo.early_stop=2 ppo.eval_interval=0": "needs ppo.eval_interval above 0",
    "ppo.train_points=false ppo.train_weights=false": "there is nothing to train",
    "ppo.antithetic=true ppo.rloo_k=1": "ppo.rloo_k 1 is out of range",
    "ppo.method=cma ppo.grouping=prompt": "compares tables on equal noise",
    "ppo.method=cma ppo.antithetic=true": "ppo.antithetic does nothing for ppo.method cma",
    "ppo.method=cma ppo.learning_by_interval=[1]": "ppo.learning_by_interval does nothing",
    "ppo.method=quotients ppo.ppo_epochs=2": "ppo.ppo_epochs does nothing for ppo.method quot",
    "ppo.method=quotients ppo.kl_coef=0.1": ": set ppo.kl_coef=0.0, or ppo.method=ppo",
    "ppo.baseline=james-stein ppo.grouping=mixed": "for ppo.grouping mixed: set that to mixed",
    "ppo.entropy_by_interval=[1]": "does nothing at ppo.entropy_coef 0",
    "ppo.guidance_interval=[0, 5]": "or nothing is guided",
    "ppo.train_guidance=true ppo.guidance_interval=[5, 1]": "is no pair, low first",
    "ppo.features=a:b ppo.eval_seeds=1": "do nothing: set ppo.pull_coef, or ppo.eval_seeds above",
    "ppo.watch=clip": "ppo.watch 'clip' is neither the reward nor a judge",
    "reward.type=multi reward.multi.weights={hps: 0}": "are all 0",
    "reward.type=multi reward.multi.weights={hps: -1}": "hps -1.0 is out of range",
    "reward.type=multi reward.weights_path=a.pt": "is one path for several",
}


BY_THE_RECIPE = {
    "model.num_steps=9": "model.num_steps 9 is not that of exps/sd3-512",
    "model.num_points=3": "which is 2: set model.num_points=2",
    "model.schedule_type=polynomial": "which is flowmatch",
    "model.backend=flux": "which is sd3",
    "model.guidance_rate=5": "model.guidance_rate 5.0 is not that of",
    "model.resolution=1024": "which is 512",
    "model.backend_options.flowmatch_shift=2": "backend_options.flowmatch_shift 2.0 is not",
    "ppo.learning_by_interval=[1, 2]": "has 2 numbers: exps/sd3-512/",
}
FILES = {
    "ppo: [": "is not YAML that can be read",
    "- 1": "holds no sections",
    "": "data.predictor_snapshot is missing",
    "data: {predictor_snapshot: a}": "reward.type is missing",
    "ppo: {steps: 1, steps: 2}": "duplicate key steps",
}


@pytest.mark.parametrize("given", [*REFUSED, *BY_THE_RECIPE, *FILES])
def test_what_cannot_be_is_one_line_with_the_key_and_what_would_do(
    given: str, tmp_path: Path
) -> None:
    file, overrides = SD3, re.split(r"(?<![:,]) ", given)  # lists and sections have spaces
    if given in FILES:
        file, overrides = tmp_path / "c.yaml", []
        file.write_text(given)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        read(file, overrides)
    assert (REFUSED | BY_THE_RECIPE | FILES)[given] in str(caught.value)


def test_pairs_that_are_drawn_anyway_may_be_asked_for() -> None:
    assert read(SD3, ["ppo.method=quotients", "ppo.antithetic=true"]).ppo.antithetic


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in tree.items():
        inner = isinstance(value, dict) and name != "weights"
        yield from leaves(value, f"{above}{name}.") if inner else [above + name]


def test_the_page_explains_every_key() -> None:
    page = (FOLDER / "README.md").read_text()
    keys = leaves(dataclasses.asdict(load_config(SD3)))
    assert [k for k in keys if f"`{k}`" not in page and f"`.{k.split('.')[-1]}`" not in page] == []
