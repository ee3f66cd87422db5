"""A page to try few-shot segmentation in the browser.

    python -m demo.web                           the demo's trained PI-CLIP (sh train.sh split0 demo 0), on http://127.0.0.1:7860
    python -m demo.web --weights W               another checkpoint, exported file, or published .pth (with --config, --arch)
    python -m demo.web --host 0.0.0.0 --port 80  for other machines, too: everyone who reaches it may use it

Nothing is loaded from or sent to elsewhere. docs/web.md tells more.
"""

import argparse
import os
import sys

import env
from demo.web.session import Model, demo_examples
from model.predictor import Predictor
from predict import asked_config, weight_file
from util import cli
from util.errors import UserError

OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*", "no_proxy": "*"}  # gradio asks for its own page, without a proxy


def main() -> None:
    given = parse()
    check_gradio()
    weights = weight_file(given.weights)
    predictor = Predictor.from_checkpoint(weights, given.device, None, asked_config(given, weights), given.arch)
    examples = demo_examples(predictor.fold.novel) if predictor.config.Train.data_set == "demo" else ()

    os.environ |= OFFLINE
    from demo.web import page  # imports gradio, which reads them

    app = page.build(Model(predictor), list(examples))
    print(f"{weights} on {page.launch(app, given.host, given.port)}  (Ctrl-C ends it)", flush=True)
    app.block_thread()


def check_gradio() -> None:
    """Raises UserError where it is not installed, or too old."""
    oldest = env.ranges("web")["gradio"]
    found = env.check_package("gradio", oldest)
    if not found.ok:
        raise UserError(f"the page needs the optional package gradio ({found.detail}): "
                        f'{sys.executable} -m pip install "gradio>={oldest}"')  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.web", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--weights", help="checkpoint, exported file, or published .pth; default: the demo's trained PI-CLIP")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--config", help="of a published .pth: config/DATASET/DATASET_EXP_NET.yaml")
    parser.add_argument("--arch", help="of a published .pth: PI_CLIP, HDMNet, BAM, PFENet")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value", help="where files are now, CLIP.clip_path=...")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    cli.run(main)
