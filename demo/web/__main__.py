"""A page to try few-shot segmentation in the browser.

    python -m demo.web                           the demo's PI-CLIP once it is trained, else the network for photographs
    python -m demo.web --weights photos          the network for photographs, in any case; or any checkpoint (see predict.py)
    python -m demo.web --clip                    no training: a name alone, and OpenAI's CLIP, which is downloaded
    python -m demo.web --clip demo/clip          the same with the demo's CLIP, for drawn scenes
    python -m demo.web --host 0.0.0.0 --port 80  for other machines, too: everyone who reaches it may use it

Nothing is loaded from or sent to elsewhere. docs/web.md tells more.
"""

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demo.shapes import NAMES
from demo.web.session import Model, demo_examples
from demo.world import NOVEL
from model import SYSTEMS
from model.predict.arguments import asked_config, check_model, model_options, use_threads
from model.predict.opening import NAMED, find_weights
from model.predict.predictor import Predictor
from model.predict.text_predictor import TextPredictor
from util import ROOT, cli
from util.cache import TensorCache
from util.errors import UserError

OLDEST = (6, 31)  # gradio
MEMORY = 2**28  # bytes of features that are kept: pictures of strangers do not come back
LARGE = [NAMES.index(name) + 1 for name in ("mug", "bottle", "mushroom")]  # drawn things that the network for photographs finds
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*", "no_proxy": "*"}  # gradio asks for its own page, without a proxy


def main() -> None:
    given = parse()
    use_threads(given.threads)
    bound_memory()
    check_gradio()
    model, classes = clip_alone(given) if given.clip is not None else trained(given)

    os.environ |= OFFLINE
    from demo.web import page  # imports gradio, which reads them

    app = page.build(model, list(demo_examples(classes)))
    print(f"{model.about}: {page.launch(app, given.host, given.port)}  (Ctrl-C ends it)", flush=True)
    app.block_thread()


def trained(given: argparse.Namespace) -> tuple[Model, Sequence[int]]:
    """A checkpoint, and the classes of the demo world to show examples of."""
    weights = find_weights(given.weights or ("demo" if (ROOT / NAMED["demo"]).is_file() else "photos"))
    predictor = Predictor.from_checkpoint(weights, given.device, None, asked_config(given, weights), given.arch)
    name, train = next(name for name, cls in SYSTEMS.items() if type(predictor.system) is cls), predictor.config.Train
    demo, photos = train.data_set == "demo", weights.resolve() == ROOT / NAMED["photos"]
    learnt = "drawn scenes" if demo else "211 photographs: small and rough" if photos else f"{train.data_set}"
    about = f"The network: {name}, trained on {learnt} (fold {train.split}, {train.shot}-shot). It runs on {predictor.device}."
    predictor.system.remember(TensorCache(MEMORY), fixed_head=True)
    shown = predictor.fold.novel if demo else LARGE if photos else ()
    return Model(predictor, about, predictor.names.texts if demo else ()), shown


def clip_alone(given: argparse.Namespace) -> tuple[Model, Sequence[int]]:
    """A CLIP without a trained network; the demo's has examples, of the classes of its first fold."""
    predictor = TextPredictor.from_clip(given.clip, given.device)
    demo = Path(given.clip).resolve() == ROOT / "demo/clip"
    about = f"The network: CLIP from {given.clip}, trained on pictures with captions. It runs on {predictor.device}."
    return Model(predictor, about, NAMES if demo else ()), NOVEL if demo else ()


def bound_memory() -> None:
    """Let glibc keep two heaps in place of one a thread: memory that one visitor's thread gave back serves the next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def check_gradio() -> None:
    """Raises UserError where it is not installed, or too old."""
    try:
        found = version("gradio")
    except PackageNotFoundError:
        found = "0"
    if [int(n) for n in found.split(".")[:2]] < [*OLDEST]:
        what = "not installed" if found == "0" else f"{found} is too old"
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"the page needs the optional package gradio ({what}): "
                        f'{sys.executable} -m pip install "gradio>={oldest}"')  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.web", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    model_options(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    given = parser.parse_intermixed_args()
    check_model(given)
    return given


if __name__ == "__main__":
    cli.run(main)
