"""Our numbers beside those of the packages that they are to equal: `make parity`."""
