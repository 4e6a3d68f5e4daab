"""A package, as torch-fidelity installs another of this name."""
