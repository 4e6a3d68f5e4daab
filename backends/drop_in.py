"""Where `EPDScheduler` and `parallel_pipeline` were: see `backends.scheduler` and `parallel`."""

from backends.parallel import parallel, parallel_pipeline
from backends.scheduler import EPDScheduler

__all__ = ["EPDScheduler", "parallel", "parallel_pipeline"]
