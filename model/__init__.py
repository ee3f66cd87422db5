"""Systems and their builder. Everything else is in the folder of its idea: clip, backbone, few_shot, weak, zero_shot."""

import importlib as _importlib
import importlib.util as _util
import os as _os

_os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads it: threads that spin make shared cores 20 times slower
if _util.find_spec("torch") is None:
    raise ImportError("No module named 'torch': prepare the environment with `python3 env.py`, then `. .venv/bin/activate`")

_OF_SYSTEM = ("Prediction", "System", "content_hash")


def __getattr__(name: str) -> object:
    """Import what is asked for, and torch with it, on first use: `model.early` answers before."""
    if name not in __all__:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(_importlib.import_module("model.system" if name in _OF_SYSTEM else "model.build"), name)


__all__ = [  # noqa: F822
    "SYSTEMS", "Prediction", "System", "build_system", "configure", "content_hash", "load_frozen", "load_start",
    "load_weights", "needs_clip", "open_system", "open_tested", "recorded", "system_class",
]  # fmt: skip
