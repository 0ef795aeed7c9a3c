"""What ranks, commands and agents import: they are forked from a process that has imported this."""

import gc
from importlib.util import find_spec

import torch
import torch._inductor.compile_fx
import torch.distributed.fsdp
import torch.nn.modules.linear_cross_entropy

import launch.agent  # noqa: F401
import tests.forked_python  # noqa: F401  # knows how Python was started here
import train.main  # noqa: F401
from train.compose import check, load
from train.engines.zero import import_deepspeed

torch.set_num_threads(1)  # a fork would lose the other threads
if find_spec("deepspeed") is not None:
    import_deepspeed(torch.device("cpu"))
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # imports 2 s of inductor

load(["engine.device=cpu"])  # builds Hydra's parsers
# What most runs of tests choose of conf/, and what they propose at their end.
base = ["data=files", "data.sources.files.paths=none", "hooks=quiet"]
engines = ([], ["engine=fsdp"], ["engine=ddp"], ["engine=deepspeed"])
for length in ([], ["schedule=constant"]):
    for engine in engines:
        load([*base, *length, *engine])
        load([*base, *length, *engine, "model=phd_cswa"])
for given in ([], base, [*base, "schedule=constant"]):
    load([*given, "model=vanilla"])
    check([*given, "sweep=k"], multirun=True)
# The garbage collector writes to all these objects, which would copy their pages in every rank.
gc.collect()
gc.freeze()
