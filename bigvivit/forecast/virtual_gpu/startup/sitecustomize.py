"""Python runs this as it starts in a dry run or on virtual GPUs: another sitecustomize first, then our hooks."""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def run_the_next() -> None:
    """The sitecustomize that would have run had this folder not been first on the path."""
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


run_the_next()
if "BIGVIVIT_VIRTUAL_GPU" in os.environ or "BIGVIVIT_DRYRUN" in os.environ:
    # Our own package, wherever the program looks for others.
    root = os.path.abspath(os.path.join(HERE, *[os.pardir] * 4))
    sys.path.insert(0, root)
    if "BIGVIVIT_VIRTUAL_GPU" in os.environ:
        from bigvivit.forecast.virtual_gpu import hooks

        hooks.install()
    if "BIGVIVIT_DRYRUN" in os.environ:
        from bigvivit.forecast.dryrun import recorder

        recorder.install()
    sys.path.remove(root)
