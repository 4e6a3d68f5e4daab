"""What a guidance rate for each call is worth to a table: rewards and Frechet distances of a scan.

    python -m exps.study.guidance --predictor epd-multistep-k2-3nfe-distribution --rates 1,1,1 \
        --rates 1,1.5,1.8 --reward fashion-judge --features efficientnet

Every line has the same prompts and noises. A gain is over the first rates, in pairs, with its
95 % interval. The Frechet distance is to the file of statistics in the model's folder.
"""

from pathlib import Path

import click
import torch

from backends.generate import generate
from backends.load import backbone_of, find_model, load_backend
from eval.compare import jobs_for, references_for
from eval.fid import statistics_of
from rewards.registry import Setup, load_rewards
from solvers.predictor import find_predictor, load_predictor, save_predictor
from src.files import NamedPath
from src.options import OneLineCommand, SeedList
from src.stats import aligned, mean_of, number
from src.text import read_prompts


