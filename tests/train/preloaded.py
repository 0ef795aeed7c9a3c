"""What ranks, commands and agents import: they are forked from a process that has imported this."""

import gc

import torch
import torch._inductor.compile_fx
import torch.distributed.fsdp
import torch.nn.modules.linear_cross_entropy

import launch.agent  # noqa: F401
import tests.forked_python  # noqa: F401  # knows how Python was started here
import train.main  # noqa: F401
from train.compose import load
from train.engines.zero import import_deepspeed

torch.set_num_threads(1)  # a fork would lose the other threads
import_deepspeed(torch.device("cpu"))
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401  # imports 2 s of inductor

load(["engine.device=cpu"])  # builds Hydra's parsers
# The garbage collector writes to all these objects, which would copy their pages in every rank.
gc.collect()
gc.freeze()
