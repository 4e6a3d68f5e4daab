# `make check` runs what CI runs. launch.sh holds the commands, so that no machine needs make.
.PHONY: check lint test format demo bench parity
check lint test demo bench parity:
	bash launch.sh $@
format:
	bash launch.sh lint --fix
