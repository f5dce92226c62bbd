"""Run an example for a test to kill: each optimizer step is announced, and takes a while.

python examples_job.py [--stall ENDING] SCRIPT ARGS...
"""

import argparse
import itertools
import os
import runpy
import shutil
import sys
import time
from typing import Any

import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from kill_resume import stall_half_way

STEP_SECONDS = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--stall", help="be half-way through the file ending so for a minute")
    parser.add_argument("script")
    args, rest = parser.parse_known_args()
    if args.stall:  # before anybody takes a reference
        torch.save = stall_half_way(torch.save, args.stall)
        safetensors.torch.save_file = stall_half_way(safetensors.torch.save_file, args.stall)
        shutil.move = stall_half_way(shutil.move, args.stall)  # Lightning's last move of a save
    import liger_kernel  # only now: transformers comes with it

    liger_kernel.install("accelerate")  # as accelerate-liger does
    torch.set_num_threads(1)
    count = itertools.count(1)

    def say(*_: Any) -> None:
        print(f"optimizer step {next(count)} done", flush=True)
        time.sleep(STEP_SECONDS)  # a window that a kill surely hits

    register_optimizer_step_post_hook(say)
    sys.argv = [args.script, *rest]
    sys.path[0] = os.path.dirname(args.script)
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
