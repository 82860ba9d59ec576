"""bigvivit: video transformers on image towers that are too big for the machine. Importing this imports no torch."""

__version__ = "0.1.0"
