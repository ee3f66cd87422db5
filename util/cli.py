"""The command line that train.py and test.py share."""

import argparse
import json
import sys
from collections.abc import Callable

from util.distributed import Terminated
from util.errors import UserError


def parse(description: str, episodes: bool = False) -> argparse.Namespace:
    """config, arch, gpus, overrides; with `episodes` also --episodes FILE, which becomes an override."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config/DATASET/DATASET_EXP_NET.yaml")
    parser.add_argument("--arch", default="PI_CLIP", help="system (default PI_CLIP)")
    parser.add_argument("--gpus", type=int, default=0, help="0 is the CPU; more than one goes through torchrun")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value")
    if episodes:
        parser.add_argument("--episodes", metavar="FILE", help="evaluate the episodes of this file")
    found = parser.parse_intermixed_args()
    if episodes and found.episodes:
        found.overrides.append(f"Test_Finetune.episodes={json.dumps(found.episodes)}")
    return found


def run(main: Callable[[], None]) -> None:
    """Runs a program: the user's mistakes end in one message and code 2, Ctrl-C in code 130, SIGTERM in 143; files stay valid."""
    try:
        main()
    except UserError as error:
        message = str(error).rpartition("util.errors.UserError: ")[2]  # of a DataLoader's worker: without its traceback
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; training continues at its last resume point when the same command runs again", file=sys.stderr)
        sys.exit(130)
    except Terminated as ended:
        print(ended, file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, what schedulers expect
