"""Scores of images under prompts: higher is better, in each model's own units."""
