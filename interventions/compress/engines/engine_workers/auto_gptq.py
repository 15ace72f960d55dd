"""AutoGPTQ 0.7.1: GPTQ, packed and unpacked again; made for GPUs, patched here to run on a CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

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
        static_groups=s["static_groups"] or s["act_order"],  # as ours: the order leaves the groups as they are
        true_sequential=s["true_sequential"],
        damp_percent=s["damping"],
    )
    wrapped = GPTQ_CAUSAL_LM_MODEL_MAP[kind](model, quantized=False, quantize_config=config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.rows]
    with Clock() as clock:
        wrapped.quantize(rows, batch_size=1, use_triton=False, use_cuda_fp16=False, cache_examples_on_gpu=False)
    return Result(weights(wrapped.model, job.original().keys()), job.answer_to_probe(wrapped.model), clock)


@torch.no_grad()
def weights(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return every parameter; unpack packed layers, with a bias only if it is among `names`."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            packed: Any = module
            found[f"{name}.weight"] = unpack(packed)
            if f"{name}.bias" in names:  # packed layers have one in any case
                found[f"{name}.bias"] = packed.bias.detach().float().clone()
    return found


def unpack(packed: Any) -> Tensor:
    """Return the weights (out, in) of a packed layer; its stored zeros are one less than meant."""
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
