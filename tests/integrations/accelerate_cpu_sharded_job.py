"""Runs a script under FSDP or ZeRO on the CPU, where accelerate would not: SCRIPT ARGS..."""

import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
