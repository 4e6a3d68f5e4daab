"""Another name for a part of src.runs, for the modules that still import it from here."""

from src.runs import Stop, Stopped

__all__ = ["Stop", "Stopped"]
