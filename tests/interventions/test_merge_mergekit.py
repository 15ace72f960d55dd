"""The step `merge` beside mergekit on the same folders; runs where mergekit is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interventions import apply
from tests.models import CONFIGS, tiny_model, tiny_tokenizer

pytest.importorskip("mergekit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

_SIZE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": CONFIGS["llama"],
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZE, tie_word_embeddings=True),
    "gpt2": CONFIGS["gpt2"],
    "phi3": CONFIGS["phi3-gqa"],
    "mixtral": lambda: transformers.MixtralConfig(**_SIZE, num_local_experts=4),
}
VECTORS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("linear", "a", "b", {"weight": [0.3, 0.9]}),
    ("linear", "a", "bc", {"weight": [0.3, 0.9, -0.5], "normalize": False}),
    ("linear", "a", "b", {"weight": [[0, 0.5, 1], 0.9]}),
    ("slerp", "a", "b", {"t": 0.3}),
    ("slerp", "a", "b", {"t": [0.1, 0.8, 0.3]}),
    *[(method, "a", "b", {"weight": [0.3, 0.9], "lambda": 0.7}) for method in VECTORS],
    ("task_arithmetic", "start", "ab", {"weight": [0.3, 0.9], "normalize": True}),
    ("ties", "a", "bc", {"weight": [0.3, 0.9, 0.5], "density": [0.5, 0.3, 0.2]}),
    ("ties", "a", "bc", {"weight": [0.3, 0.9, -0.5], "density": 0.2, "rescale": True, "normalize": False}),
    ("ties", "a", "b", {"weight": [[0, 1], [1, 0.2]], "density": [[0.5, 0.1], [0.3]]}),
    *[(method, "a", "bc", {"weight": [0.3, 0.9, 0.5], "density": [0.5, 0.3, 0.2]}) for method in VECTORS[2:]],
    ("dare_ties", "start", "ab", {"weight": [0.3, 0.9], "density": 0.4, "rescale": False}),
    ("model_stock", "a", "bc", {}),
    ("model_stock", "start", "ab", {"filter_wise": True}),
    ("sce", "a", "bc", {}),
    ("sce", "a", "bc", {"select_topk": 0.3}),
]
"""Method, the model before the step, the others, and mergekit's parameters."""


def write(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model `start`, and models `a` to `c` that are it plus noise."""
    for seed, name in enumerate(("start", "a", "b", "c")):
        model, noise = tiny_model(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                size = 0.3 * seed * float(parameter.std().clamp(min=0.1))
                parameter.add_(size * torch.randn(parameter.shape, generator=noise))
        model.to(dtype).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def by_mergekit(folder: Path, method: str, start: str, others: str, given: dict[str, Any]) -> Path:
    """Merge with mergekit in float32 and return the folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    names = [*([] if start == "start" and method != "linear" else [start]), *others]
    own = {key: given[key] for key in ("weight", "density") if key in given}
    models = [
        {
            "model": str(folder / name),
            "parameters": {key: value[place] if isinstance(value, list) else value for key, value in own.items()},
        }
        for place, name in enumerate(names)
    ]
    config = {
        "merge_method": method,
        "models": models,
        "parameters": {key: value for key, value in given.items() if key not in own},
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(folder / ("start" if method != "slerp" else start))
    options = MergeOptions(quiet=True, copy_tokenizer=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(folder / "merged"), options)
    return folder / "merged"


def by_us(folder: Path, method: str, start: str, others: str, given: dict[str, Any]) -> Any:
    """Merge with the step `merge` and return the model."""
    own = dict(given)
    if "select_topk" in own:
        own["density"] = own.pop("select_topk")
    if "rescale" in own:
        own["rescale"] = "l1" if own["rescale"] else "none"
    if method not in ("linear", "slerp"):
        own["base"] = str(folder / "start")
    model = loaded(folder / start)
    others_ = [str(folder / name) for name in others]
    apply(model, tiny_tokenizer(), "merge", **{"method": method, "with": others_} | own)
    return model


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def difference(one: Any, other: Any) -> float:
    """Return the largest difference of two weights, relative to the larger of the weight and 1."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        return max(float(((p - theirs[n]).abs() / p.abs().clamp(min=1)).max()) for n, p in ours.items())


@pytest.fixture(scope="module", params=[*FAMILIES, "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    half = request.param == "bfloat16"
    write(FAMILIES["llama" if half else request.param](), root, torch.bfloat16 if half else torch.float32)
    return root


@pytest.mark.parametrize(("method", "start", "others", "given"), CASES)
def test_equal_to_mergekit(
    folder: Path, method: str, start: str, others: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = _share_masks(monkeypatch)
    model = by_us(folder, method, start, others, given)
    assert difference(model, loaded(by_mergekit(folder, method, start, others, given))) < 1e-6
    assert bool(masks) == (method.startswith("dare") and "density" in given)


def _share_masks(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Tensor]:
    """Let mergekit drop the entries of task vectors that we drop, whatever the order in which it comes to them."""
    from mergekit import sparsify

    from interventions.merge.kernels import formulas

    masks: dict[bytes, Tensor] = {}
    ours = formulas.random_mask

    def remembered(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
        masks[delta.numpy().tobytes()] = mask = ours(delta, density, generator)
        return mask

    def bernoulli(tensor: Tensor, density: float, rescale_norm: Any = None) -> Tensor:
        if density >= 1:
            return tensor
        mask = masks[tensor.numpy().tobytes()].to(tensor.dtype)
        return sparsify.rescaled_masked_tensor(tensor, mask, rescale_norm)

    monkeypatch.setattr(formulas, "random_mask", remembered)
    monkeypatch.setattr(sparsify, "bernoulli", bernoulli)
    return masks


def test_a_folder_that_mergekit_wrote(folder: Path) -> None:
    """It is read like any other: the mean with it is the mean of the weights."""
    written = by_mergekit(folder, "ties", "a", "b", {"weight": 1.0, "density": 0.5})
    model, theirs = loaded(folder / "c"), dict(loaded(written).named_parameters())
    wanted = {name: (parameter + theirs[name]) / 2 for name, parameter in model.named_parameters()}
    report = apply(model, tiny_tokenizer(), "merge", method="linear", with_=str(written))
    assert not report.warnings
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name])
