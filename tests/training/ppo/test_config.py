import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from solvers.predictor import Recipe, find_predictor, load_predictor
from src.text import read_prompts
from training.ppo.config import Config, check_against, check_ranks, leaves, load_config
from training.ppo.runs import to_yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "training" / "ppo"
CFGS = sorted((FOLDER / "cfgs").glob("*.yaml"))
SD3 = FOLDER / "cfgs" / "sd3_512.yaml"
PUBLISHED = ("sd15", "sd3_512", "sd3_1024", "flux_dev")


def refused(*overrides: str, file: Path = SD3) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load_config(file, overrides)
    return str(caught.value)


def recipe(config: Config) -> Recipe:
    return load_predictor(find_predictor(config.data.predictor_snapshot)).recipe


def named(name: str) -> Config:
    return load_config(FOLDER / "cfgs" / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_agrees_with_the_recipe_of_its_predictor(name: str) -> None:
    check_against(named(name), recipe(named(name)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_has_the_published_values(name: str) -> None:
    ppo = named(name).ppo
    assert (ppo.rloo_k, ppo.ppo_epochs, ppo.minibatch_size) == (4, 1, 4)
    assert (ppo.learning_rate, ppo.clip_range, ppo.max_grad_norm) == (7e-5, 0.2, 1)
    assert (ppo.kl_coef, ppo.entropy_coef, ppo.grouping) == (0, 0, "crn")
    assert ppo.dirichlet_concentration == (20 if name == "sd15" else 10)
    assert ppo.rollout_batch_size == (16 if name == "sd3_512" else 8)


@pytest.mark.parametrize("path", CFGS, ids=lambda path: path.stem)
def test_every_file_tells_every_key_that_matters(path: Path) -> None:
    told = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    assert isinstance(told, dict)
    for section, keys in told.items():
        known = {f.name for f in dataclasses.fields(getattr(load_config(path), str(section)))}
        assert known - {"multi"} <= keys.keys()


def test_resolved_settings_read_back_as_they_were(tmp_path: Path) -> None:
    overrides = ["reward.type=multi", "reward.multi.weights={hps: 1, clip: 0.5}"]
    config = load_config(SD3, [*overrides, "reward.weights_path={hps: a.pt}", "run.seed=7"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_an_override_is_told_last() -> None:
    config = load_config(SD3, ["ppo.steps=100", "ppo.learning_rate=1e-4", "ppo.steps=200"])
    assert (config.ppo.steps, config.ppo.learning_rate) == (200, 1e-4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.learnin_rate=1", "'ppo.learnin_rate': did you mean ppo.learning_rate?"),
        ("pp.steps=3", "'pp': did you mean ppo?"),
        ("model.backend_options.dtyp=x", "did you mean model.backend_options.dtype?"),
        ("reward.weight_path=x", "did you mean reward.weights_path?"),
        ("ppo=3", "is not section.key=value"),
        ("ppo.steps", "is not section.key=value"),
        ("ppo.steps=[", "cannot be read"),
        ("reward.multi=3", "reward.multi 3 is no section: it has the keys weights"),
    ],
)
def test_a_key_that_is_not_there_names_the_nearest(override: str, said: str) -> None:
    assert said in refused(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.steps=1.5", "ppo.steps is '1.5', where int belongs"),
        ("ppo.steps=true", "ppo.steps is 'True', where int belongs"),
        ("ppo.steps=null", "ppo.steps is 'None', where int belongs"),
        ("ppo.clip_range=wide", "ppo.clip_range is 'wide', where float belongs"),
        ("logging.tensorboard=maybe", "logging.tensorboard is 'maybe', where bool belongs"),
        ("reward.judges=clip", "reward.judges is 'clip', where list belongs"),
        ("reward.judges=[1]", "reward.judges is '1', where str belongs"),
        ("reward.multi.weights={hps: x}", "reward.multi.weights.hps is 'x', where float belongs"),
        ("data.prompt_csv=null", "data.prompt_csv is 'None', where str belongs"),
        ("reward.weights_path=[1]", "reward.weights_path [1] is no path"),
        ("ppo.clip_range=${ppo.nothing}", "ppo.clip_range"),
    ],
)
def test_another_type_is_refused_by_key_and_value(override: str, said: str) -> None:
    assert said in refused(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.clip_range=.nan", "ppo.clip_range nan is out of range: above 0, 1 at most"),
        ("ppo.learning_rate=.inf", "ppo.learning_rate inf is out of range"),
        ("ppo.learning_rate=0", "ppo.learning_rate 0.0 is out of range: above 0"),
        ("ppo.steps=0", "ppo.steps 0 is out of range: 1 or more"),
        ("ppo.kl_coef=-1", "ppo.kl_coef -1.0 is out of range: 0 or more"),
        ("ppo.dirichlet_concentration=.nan", "ppo.dirichlet_concentration nan is out of range"),
        ("ppo.eval_prompts=1", "ppo.eval_prompts 1 is out of range: 2 or more"),
        ("logging.keep_last=0", "logging.keep_last 0 is out of range: 1 or more"),
        ("run.seed=-1", "run.seed -1 is out of range"),
        ("model.guidance_rate=.nan", "model.guidance_rate nan is out of range"),
        ("model.num_points=0", "model.num_points 0 is out of range: 1 or more, 8 at most"),
        ("model.backend=sd33", "unknown model.backend 'sd33': did you mean sd3?"),
        ("ppo.grouping=crm", "unknown ppo.grouping 'crm': did you mean crn?"),
        ("model.model=''", "model.model is empty"),
        ("run.run_name='a/b'", "run.run_name 'a/b' cannot name a folder"),
        ("reward.multi.weights={hps: 1}", "reward.multi.weights do nothing for reward.type hps"),
    ],
)
def test_a_value_out_of_range_says_what_would_do(override: str, said: str) -> None:
    assert said in refused(override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("ppo.rloo_k=3",), "ppo.rloo_k 3 does not divide ppo.rollout_batch_size 16"),
        (("ppo.minibatch_size=5",), "set ppo.rollout_batch_size=20"),
        (("ppo.decode_rgb=false",), "every reward looks at decoded images"),
        (("ppo.early_stop=2", "ppo.eval_interval=0"), "needs ppo.eval_interval above 0"),
        (("reward.type=multi", "reward.multi.weights={hps: 0}"), "are all 0"),
        (("reward.type=multi", "reward.multi.weights={hps: -1}"), "hps -1.0 is out of range"),
        (("reward.type=multi", "reward.weights_path=a.pt"), "is one path for several"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], said: str
) -> None:
    assert said in refused(*overrides)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ppo: [", "is not YAML that can be read"),
        ("- 1", "holds no sections"),
        ("", "data is missing"),
        ("data: {predictor_snapshot: a}", "data.prompt_csv is missing"),
        ("ppo: {steps: 1, steps: 2}", "duplicate key steps"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert said in refused(file=tmp_path / "c.yaml")


def test_a_file_that_is_not_there_is_named() -> None:
    assert refused(file=Path("nowhere.yaml")) == "no such file: nowhere.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_steps=9", "model.num_steps 9 is not that of exps/sd3-512"),
        ("model.num_points=3", "which is 2: set model.num_points=2"),
        ("model.schedule_type=polynomial", "which is flowmatch"),
        ("model.schedule_rho=7", "which is 1.0"),
        ("model.backend=flux", "which is sd3"),
        ("model.guidance_rate=5", "model.guidance_rate 5.0 is not that of"),
        ("model.guidance_type=null", "which is cfg"),
        ("model.resolution=1024", "which is 512"),
        ("model.resolution=null", "model.resolution None is not that of"),
    ],
)
def test_what_the_recipe_says_otherwise_is_refused_with_both_values(
    override: str, said: str
) -> None:
    config = load_config(SD3, [override])
    with pytest.raises(ValueError, match=re.escape(said)):
        check_against(config, recipe(config))


def test_a_predictor_of_another_solver_is_refused() -> None:
    config = named("sd3_512")
    other = dataclasses.replace(recipe(config), solver="epd-multistep")
    with pytest.raises(ValueError, match="is of epd-multistep"):
        check_against(config, other)


def test_more_ranks_than_images_are_refused() -> None:
    check_ranks(named("sd15").ppo, 8)
    with pytest.raises(ValueError, match="9 ranks are more than"):
        check_ranks(named("sd15").ppo, 9)


def test_the_weights_of_multi_make_its_name() -> None:
    config = load_config(SD3, ["reward.type=multi", "reward.multi.weights={hps: 1, mps: 0}"])
    assert config.reward.name == "multi:hps=1.0,mps=0.0"
    assert named("sd3_512").reward.name == "hps"


def test_the_page_explains_every_key() -> None:
    page = (FOLDER / "README.md").read_text()
    keys = [name for name, _ in leaves(named("sd3_512"))]
    missing = [k for k in keys if f"`{k}`" not in page and f"`.{k.split('.')[-1]}`" not in page]
    assert missing == []


def test_prompts_of_training_and_of_evaluation_share_none() -> None:
    for trained, held_out in (("train.txt", "test.txt"), ("emoji-train.txt", "emoji-heldout.txt")):
        one, other = (read_prompts(ROOT / "src" / "prompts" / n) for n in (trained, held_out))
        assert len(set(one)) == len(one) > 1000
        assert not set(one) & set(other)
