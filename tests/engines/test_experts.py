"""GPTQ of routed experts against llm-compressor, which splits fused experts into layers: `make test-engines`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from interventions import apply
from interventions.compress.engines import table
from interventions.compress.kernels import integers
from tests.engines.states import READ, windows
from tests.experts import tiny_experts
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.engines

_SCRIPT = """
import json, sys, torch
from compressed_tensors.quantization import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, every, out, engines = sys.argv[1:]
sys.path.insert(0, engines)
from engine_workers.job import stand_in_tokenizer

IntermediatesCache.pin_memory = lambda self, *_, **__: None
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
linearize_moe(model)
rows = json.load(open(folder + "/rows.json"))
weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head", "re:.*gate$"], dampening_frac=0.01, actorder=None)]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
oneshot(
    model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=len(rows[0]),
    shuffle_calibration_samples=False, batch_size=1, pipeline="basic", moe_calibrate_all_experts=every == "yes",
    processor=stand_in_tokenizer(),
)
found = {}
for name, module in model.named_modules():
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and scheme.weights is not None:
        found[name] = forward_quantize(module, module.weight, "weight", scheme.weights).detach().contiguous()
save_file(found, out)
"""


def peer(model: torch.nn.Module, folder: Path, every: bool) -> dict[str, Tensor]:
    """Return the weights (out, in) of all layers that llm-compressor rounds, by name; experts one by one."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "rows.json").write_text(json.dumps(windows()["input_ids"].tolist()))
    python, out = table.interpreter(table.find_engine("gptq", "llmcompressor"), None), folder / "found.safetensors"
    command = [python, "-c", _SCRIPT, folder, "yes" if every else "no", out, Path(table.__file__).parent]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return load_file(out)


def own(name: str, weights: dict[str, Tensor]) -> Tensor:
    """Return the weight of a layer, or of one expert's part of a fused parameter."""
    if f"{name}.weight" in weights:
        return weights[f"{name}.weight"]
    stack, _, rest = name.partition(".experts.")
    expert, _, layer = rest.partition(".")
    if layer == "down_proj":
        return weights[f"{stack}.experts.down_proj"][int(expert)]
    gate, up = weights[f"{stack}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if layer == "gate_proj" else up


@pytest.mark.parametrize("every", [True, False], ids=["all-experts", "routed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_gptq_rounds_experts_to_the_same_levels(
    family: str, every: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its scales have the model's dtype. Its sequential pipeline calibrates these families without a causal mask.
    monkeypatch.setattr(integers, "stored_scales", lambda scales, dtype: scales)
    model = tiny_experts(family, intermediate_size=32, moe_intermediate_size=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = peer(model, tmp_path, every)
    settings = {"static_groups": True, "true_sequential": False, "sequential": False, "calibrate_all_experts": every}
    apply(model, tiny_tokenizer(), "gptq", **READ, bits=4, group_size=8, **settings)
    after = model.state_dict()
    assert sum(".experts." in name for name in theirs) == 3 * 8 * len(model.model.layers)
    for name, weight in theirs.items():
        assert not torch.equal(weight, own(name, before))
        same = torch.isclose(own(name, after), weight, rtol=1e-4, atol=1e-6)
        assert float(same.float().mean()) >= 0.999, name
