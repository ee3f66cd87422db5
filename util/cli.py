"""The command line that train.py and test.py share."""

import argparse
import json
import os
import sys
from collections.abc import Callable

from util.errors import Terminated, UserError


def parse(description: str, episodes: bool = False, plan: bool = False) -> argparse.Namespace:
    """Parse config, arch, gpus, quiet and overrides; with `episodes` also --episodes FILE, which becomes an override; with
    `plan` also --dry-run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config/DATASET/DATASET_EXP_NET.yaml")
    parser.add_argument("--arch", required=True, help="system, PI_CLIP and so on (`train.sh` and `test.sh`: $ARCH)")
    parser.add_argument("--gpus", type=int, default=0, help="0 is the CPU; more than one goes through torchrun")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on the console; the log file has all")
    if plan:
        parser.add_argument("--dry-run", action="store_true", help="estimate time, memory and disk from a few measured steps")
    if episodes:
        parser.add_argument("--episodes", metavar="FILE", help="evaluate the episodes of this file")
    found = parser.parse_intermixed_args()
    if episodes and found.episodes:
        found.overrides.append(f"Test_Finetune.episodes={json.dumps(found.episodes)}")
    return found


def run(main: Callable[[], None], after: str = "") -> None:
    """Run a program. A user's mistake ends in one message and code 2, Ctrl-C in code 130, SIGTERM in 143. Files stay valid.

    after: what to know when it was stopped, or a worker died.
    """
    more = f"; {after}" * bool(after)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # torch raises it anywhere when a worker dies or hangs
        if "DataLoader" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"error: reading the data failed: {reason}\nA worker process was killed (out of memory?)"
              f" or hangs (a slow disk?); try Train.workers=0{more}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # `... | head` has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # of a worker's pipe, or the like
    except KeyboardInterrupt:
        print(f"\ninterrupted{more}", file=sys.stderr)
        sys.exit(130)
    except Terminated as ended:
        print(ended, file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, what schedulers expect
