"""Load an adapter into a fresh wrap under DDP, under FSDP2 and onto the meta device.

Run by tests/test_groups_travel.py in a process of its own, because torch.distributed is initialised. Prints one JSON
list a line: the route, the width, whether logits (or, where parameters are sharded, all tensors) are the adapter's,
and whether the layers' groups and the configuration's are.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from models import GROUPS, adapter_config, logits, perturb, tiny_llama, wrap
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM


def main() -> None:
    """Every route at both widths."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for width in (None, 16):
        source = wrap(tiny_llama(), GROUPS["llama"], head_dim=width)
        expected = logits(source)
        state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        for route in (under_ddp, under_fsdp2, on_meta):
            model, same = route(width, source, expected, dict(state))
            groups = model.base_model.head_groups("default").to_lists()
            recorded = model.peft_config["default"].head_groups
            print(json.dumps([route.__name__, width, same, groups == recorded == GROUPS["llama"]]))
    dist.destroy_process_group()


def fresh(width: int | None) -> PeftModel:
    """Another adapter of the same counts, in neighbouring groups."""
    model = get_peft_model(tiny_llama(), adapter_config(head_dim=width)).eval()
    perturb(model, seed=7)
    return model


def under_ddp(width, source, expected, state) -> tuple[PeftModel, bool]:
    """Through DistributedDataParallel, whose names have a prefix."""
    model = fresh(width)
    DistributedDataParallel(model).load_state_dict({f"module.{name}": tensor for name, tensor in state.items()})
    return model, torch.equal(logits(model), expected)


def under_fsdp2(width, source, expected, state) -> tuple[PeftModel, bool]:
    """Layers are sharded, the state dict is whole."""
    model, mesh = fresh(width), init_device_mesh("cpu", (1,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    loaded = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    original = source.state_dict()
    same = True
    for name, tensor in loaded.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        same = same and torch.equal(whole, original[name])
    return model, same


def on_meta(width, source, expected, state) -> tuple[PeftModel, bool]:
    """Base and adapter have no storage before their tensors are assigned."""
    with torch.device("meta"):
        base = LlamaForCausalLM(source.config)
    model = get_peft_model(base, adapter_config(head_dim=width), low_cpu_mem_usage=True)
    model.load_state_dict(state, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # rotary frequencies, which no state dict holds
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, source.get_buffer(name))
    return model, torch.equal(logits(model.eval()), expected)


if __name__ == "__main__":
    main()
