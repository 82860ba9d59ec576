"""What can go wrong with one video. Needs no torch, so that a process that only passes it on needs none."""


class DecodeError(RuntimeError):
    """A video that cannot be opened or read; names the file."""


class WorkerLostError(DecodeError):
    """A video whose decoding ended its process, or took so long that this was killed; knows no file."""
