"""GPTQModel: GPTQ, packed and unpacked again before its packed layers change their form for speed."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .job import Clock, Job, Result, main, stand_in_tokenizer


def drive(job: Job) -> Result:
    """Quantise a saved copy of the model, and unpack the weights."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, job.threads))  # it asks for two of them at least
    source = str(job.folder / "model")
    job.model().save_pretrained(source)  # it loads models itself
    stand_in_tokenizer().save_pretrained(source)
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    s = job.settings
    config = QuantizeConfig(
        bits=s["bits"],
        group_size=s["group_size"],
        sym=s["symmetric"],
        desc_act=s["act_order"],
        act_group_aware=False,
        static_groups=s["static_groups"] or s["act_order"],  # as ours: the order leaves the groups as they are
        true_sequential=s["true_sequential"],
        damp_percent=s["damping"],
        offload_to_disk=False,
        pack_impl="original",  # the other ones are compiled first, for half a minute
        device="cpu",
    )
    model = GPTQModel.load(source, config, dtype=torch.float32, backend=BACKEND.TORCH)
    rows = [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in job.rows]
    with Clock() as clock:
        model.quantize(rows, batch_size=1, calibration_data_min_length=1, backend=BACKEND.TORCH)
    found = weights(model.model)  # before the first forward pass
    return Result(found, job.answer_to_probe(model.model), clock)


@torch.no_grad()
def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter; unpack packed layers, which stay usable."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            packed: Any = module
            if packed.qzero_format() == 1:
                # Ready to be saved, with zeros less one. What it loads again it converts like this.
                convert_gptq_v1_to_v2_format_module(packed, bits=packed.bits, pack_dtype=packed.pack_dtype)
            found[f"{name}.weight"] = packed.dequantize_weight().t().float()
            if packed.bias is not None:
                found[f"{name}.bias"] = packed.bias.detach().float().clone()
    return found


if __name__ == "__main__":
    main(drive, "gptqmodel")
