"""Systems and their builder. Everything else is in the folder of its idea: clip, backbone, few_shot, weak, zero_shot."""

import os as _os

_os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads it: threads that spin make shared cores 20 times slower
try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise ImportError(f"{_error}: prepare the environment with `python3 env.py`, then `. .venv/bin/activate`") from None

from model.build import (
    SYSTEMS,
    build_system,
    configure,
    load_frozen,
    load_start,
    load_weights,
    needs_clip,
    open_system,
    open_tested,
    recorded,
    system_class,
)
from model.system import Prediction, System, content_hash

__all__ = [
    "SYSTEMS", "Prediction", "System", "build_system", "configure", "content_hash", "load_frozen", "load_start",
    "load_weights", "needs_clip", "open_system", "open_tested", "recorded", "system_class",
]  # fmt: skip
