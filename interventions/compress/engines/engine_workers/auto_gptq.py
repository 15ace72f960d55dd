"""AutoGPTQ 0.7.1: GPTQ, packed and unpacked again; patched to run on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .job import Clock, Job, Refused, Result, main


def drive(job: Job) -> Result:
    """Quantise and pack the model, and unpack the weights again."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    s = job.settings
    if s["bits"] not in (2, 3, 4, 8):
        raise Refused(f"packs 2, 3, 4 and 8 bits, not bits={s['bits']}")
    model = job.model()
    kind = model.config.model_type
    if kind not in GPTQ_CAUSAL_LM_MODEL_MAP:
        raise Refused(f"does not know models of type {kind}")
    config = BaseQuantizeConfig(
        bits=s["bits"],
        group_size=s["group_size"],
        sym=s["symmetric"],
        desc_act=s["act_order"],
        static_groups=s["static_groups"] or s["act_order"],  # groups keep the original column order, as in our kernel
        true_sequential=s["true_sequential"],
        damp_percent=s["damping"],
    )
    wrapped = GPTQ_CAUSAL_LM_MODEL_MAP[kind](model, quantized=False, quantize_config=config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.rows]
    with Clock() as clock:
        wrapped.quantize(rows, batch_size=1, use_triton=False, use_cuda_fp16=False, cache_examples_on_gpu=False)
    return Result(job.read_weights(wrapped.model, unpack), job.answer_to_probe(wrapped.model), clock)


def unpack(packed: Any) -> Tensor:
    """Return the weights (out, in) of a packed layer; it stores zero points minus one."""
    values = columns_of(packed.qweight.t(), packed.bits)[:, : len(packed.g_idx)]  # (out, in)
    zeros = columns_of(packed.qzeros, packed.bits)[:, : packed.scales.shape[1]] + 1  # (groups, out)
    groups = packed.g_idx.long()
    return packed.scales.float()[groups].t() * (values - zeros[groups].t())  # type: ignore[no-any-return]


def columns_of(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words (rows, n) into numbers (rows, 32 n // bits), lowest bits first."""
    places = torch.arange(32)
    stream = (words.unsqueeze(2) >> places & 1).reshape(len(words), -1)
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (whole << torch.arange(bits)).sum(dim=2)


if __name__ == "__main__":
    main(drive, "auto-gptq")
