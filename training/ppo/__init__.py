"""Stage 2: a residual Dirichlet policy over tables, trained by PPO with RLOO on image rewards."""
