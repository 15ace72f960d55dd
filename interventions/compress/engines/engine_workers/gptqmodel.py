"""GPTQModel: GPTQ; its weights are unpacked before the first forward pass, which reorders packed layers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .job import Clock, Job, Result, main, stand_in_tokenizer


def drive(job: Job) -> Result:
    """Quantise a saved copy of the model, and unpack the weights."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, job.threads))  # it needs at least two
    source = str(job.folder / "model")
    job.model().save_pretrained(source)  # GPTQModel.load reads a folder
    stand_in_tokenizer().save_pretrained(source)
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    s = job.settings
    config = QuantizeConfig(
        bits=s["bits"],
        group_size=s["group_size"],
        sym=s["symmetric"],
        desc_act=s["act_order"],
        act_group_aware=False,
        static_groups=s["static_groups"] or s["act_order"],  # groups keep the original column order, as in our kernel
        true_sequential=s["true_sequential"],
        damp_percent=s["damping"],
        offload_to_disk=False,
        pack_impl="original",  # the others compile for half a minute
        device="cpu",
    )
    model = GPTQModel.load(source, config, dtype=torch.float32, backend=BACKEND.TORCH)
    rows = [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in job.rows]
    with Clock() as clock:
        model.quantize(rows, batch_size=1, calibration_data_min_length=1, backend=BACKEND.TORCH)
    weights = job.read_weights(model.model, unpack)  # before the first forward pass
    return Result(weights, job.answer_to_probe(model.model), clock)


def unpack(packed: Any) -> Tensor:
    """Return the weights (out, in) of a packed layer, which stays usable."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    if packed.qzero_format() == 1:  # zero points minus one, ready to be saved; loading converts them the same way
        convert_gptq_v1_to_v2_format_module(packed, bits=packed.bits, pack_dtype=packed.pack_dtype)
    return packed.dequantize_weight().detach().t().float()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(drive, "gptqmodel")
