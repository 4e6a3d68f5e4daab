"""Measures images and solvers: distances, errors, scores and times."""
