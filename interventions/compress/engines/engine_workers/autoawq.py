"""AutoAWQ 0.2.9: 4 bits, packed by groups; the texts are joined and cut to the longest one's length."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .job import Clock, Job, Refused, Result, main


def drive(job: Job) -> Result:
    """Quantise and pack the model, and unpack the weights again."""
    s = job.settings
    if s["bits"] != 4:
        raise Refused(f"packs 4 bits only, not bits={s['bits']}")
    if s["group_size"] < 1:
        raise Refused(f"needs groups: group_size={s['group_size']} is not possible")
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from awq.models.base import AwqConfig
    from awq.modules.linear import gemm

    gemm.TRITON_AVAILABLE = False  # otherwise it runs GPU kernels wherever triton can be imported
    patch_search()
    model = job.model()
    kind = model.config.model_type
    if kind not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise Refused(f"does not know models of type {kind}")
    odd = [n for n in job.linears if model.get_submodule(n).in_features % s["group_size"]]
    if odd:
        raise Refused(f"needs a width that is a multiple of group_size={s['group_size']}: {', '.join(odd[:3])}")
    wrapped = AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, model.config, AwqConfig(), None)
    with Clock() as clock:
        wrapped.quantize(
            None,
            quant_config={"zero_point": True, "q_group_size": s["group_size"], "w_bit": 4, "version": "GEMM"},
            calib_data=job.rows,
            duo_scaling=s["duo_scaling"],
            apply_clip=s["clip"],
            max_calib_samples=len(job.rows),
            max_calib_seq_len=max(map(len, job.rows)),
        )
    return Result(job.read_weights(model, unpack), job.answer_to_probe(model), clock)


def patch_search() -> None:
    """Make the search for scales restore the original weights.

    AutoAWQ saves them as `state_dict` entries moved to the CPU. On a CPU these are the weights themselves,
    so the first scales tried would change them for good.
    """
    from awq.quantize.quantizer import AwqQuantizer

    search = AwqQuantizer._compute_best_scale
    if getattr(search, "patched", False):
        return

    def patched(self: Any, x: Tensor, w_mean: Tensor, x_mean: Tensor, module: nn.Module, *rest: Any) -> Any:
        def copied() -> dict[str, Tensor]:
            return {name: value.clone() for name, value in nn.Module.state_dict(module).items()}

        module.__dict__["state_dict"] = copied
        try:
            return search(self, x, w_mean, x_mean, module, *rest)
        finally:
            del module.__dict__["state_dict"]

    patched.patched = True  # type: ignore[attr-defined]
    AwqQuantizer._compute_best_scale = patched


def unpack(packed: Any) -> Tensor:
    """Return the weights (out, in) of a packed layer."""
    from awq.utils.packing_utils import dequantize_gemm

    transposed = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, packed.w_bit, packed.group_size)
    return transposed.detach().t().float()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(drive, "autoawq")
