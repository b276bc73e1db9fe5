"""Runs a script under accelerate's FSDP or DeepSpeed on CPUs:   launch_on_cpu.py script.py [its arguments]

accelerate offers both only to processes with an accelerator each. Gloo can do what they need, so here the processes
pass for ones with a GPU. Everything else, sharding and gathering included, is the real thing.
"""

import runpy
import sys

import torch
from accelerate.state import DistributedType, PartialState

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
