"""Rotations that are folded into the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interventions import InterventionError, apply
from interventions.compress.kernels.hadamard import find_hadamard, random_rotation
from interventions.offload import offload
from interventions.tying import tied_head
from tests.interventions.test_fold_proof import FAMILIES, by_head, clipped
from tests.interventions.test_smooth import logits, off
from tests.models import CONFIGS, VOCABULARY, tiny_model

# Importing the model of StarCoder uses it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

REFUSED = {
    "gemma2": "post_feedforward_layernorm normalises what model.layers.0.mlp.down_proj adds to the stream",
    "gemma2-capped": "post_feedforward_layernorm normalises what model.layers.0.mlp.down_proj adds to the stream",
    "gemma3": "post_feedforward_layernorm normalises what model.layers.0.mlp.down_proj adds to the stream",
    "gemma4": "post_feedforward_layernorm normalises what model.layers.0.mlp.down_proj adds to the stream",
    "opt-after": "model.decoder.layers.0 does not compute the same on rotated hidden states",
    "opt-post-norm": "the embeddings are 16 wide, the residual stream 32",
}
STAY = ("bitnet", "olmo-clip")  # a norm after the values, and a clip


def make(family: str, **options: Any) -> Any:
    return tiny_model(FAMILIES[family][0]() if family in FAMILIES else family, **options)


def stream(model: Any) -> Tensor:
    """The hidden states before the first block."""
    found: list[Tensor] = []
    block = next(module for name, module in model.named_modules() if name.endswith(("layers.0", "h.0")))
    handle = block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(model)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", [*CONFIGS, *FAMILIES])
def test_the_logits_stay_or_the_model_does(family: str) -> None:
    model = make(family)
    wanted, before = logits(model), copy.deepcopy(model.state_dict())
    if family in REFUSED:
        with pytest.raises(InterventionError, match=f"rotate: .*{REFUSED[family]}"):
            apply(model, None, "rotate")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    report = apply(model, None, "rotate")
    assert off(logits(model), wanted) < 2e-6
    assert ("values" in report.details["matrices"]) == (family not in STAY) == (not report.warnings)
    weights = [name for name, value in model.state_dict().items() if value.ndim == 2 and "head" not in name]
    assert all(not torch.allclose(model.state_dict()[name], before[name]) for name in weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("matrix", ["hadamard", "orthogonal"])
def test_hidden_states_are_those_in_another_basis(family: str, matrix: str) -> None:
    model = tiny_model(family)
    before = stream(model)
    apply(model, None, "rotate", matrix=matrix, seed=5)
    after = stream(model)
    Q = torch.linalg.lstsq(before.flatten(0, 1), after.flatten(0, 1)).solution
    torch.testing.assert_close(Q @ Q.t(), torch.eye(len(Q)), atol=1e-4, rtol=0)
    even = torch.allclose(Q.abs() * len(Q) ** 0.5, torch.ones_like(Q), atol=1e-3)
    assert even == (matrix == "hadamard" and family == "llama")
    if family == "gpt2":  # whose layer norms subtract the mean
        torch.testing.assert_close(after.mean(-1), before.mean(-1), atol=1e-4, rtol=1e-3)


def test_a_few_large_channels_become_none() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 50
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:, 3] *= 50
    wanted = logits(model)

    @torch.no_grad()
    def peak(x: Tensor) -> float:
        return float(x.abs().amax(-1).div(x.square().mean(-1).sqrt()).mean())

    before = peak(stream(model)), peak(model.model.layers[0].mlp.gate_proj.weight)
    apply(model, None, "rotate")
    assert off(logits(model), wanted) < 1e-4
    after = peak(stream(model)), peak(model.model.layers[0].mlp.gate_proj.weight)
    assert all(old > 4 and new < 2 for old, new in zip(before, after, strict=True))


def test_seeds_give_other_matrices_and_the_same_seed_the_same() -> None:
    models = [tiny_model("llama") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        apply(model, None, "rotate", seed=seed)
    one, same, other = (model.model.embed_tokens.weight for model in models)
    assert torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2", "gpt_neox", "opt-post-norm"])
def test_values_alone(family: str) -> None:
    model, before = tiny_model(family), tiny_model(family)
    report = apply(model, None, "rotate", stream=False)
    assert off(logits(model), logits(before)) < 2e-6
    assert report.details["matrices"] == {"values": "hadamard"} and not report.details["head_untied"]
    assert all("attn" in name or "attention" in name for name in report.changed)
    assert len({name.rpartition(".")[0] for name in report.changed}) == 2 * 2  # layers that make and read them
    with pytest.raises(InterventionError, match=r"rotate.values=false: nothing is left to rotate"):
        apply(model, None, "rotate", stream=False, values=False)


def tied(**settings: Any) -> Any:
    config = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True} | settings)
    return tiny_model(config)


def test_a_tied_head_gets_its_own_weights_only_for_an_uneven_gain() -> None:
    model = tied()
    wanted = logits(model)
    report = apply(model, None, "rotate")
    assert off(logits(model), wanted) < 2e-6
    assert report.details["head_untied"] and "lm_head.weight" in report.changed
    assert tied_head(model) is None and not model.config.tie_word_embeddings
    model.tie_weights()  # as transformers does when it saves or reads
    assert off(logits(model), wanted) < 2e-6

    even = tied()
    with torch.no_grad():
        even.model.norm.weight.fill_(0.7)
    wanted = logits(even)
    report = apply(even, None, "rotate")
    assert off(logits(even), wanted) < 2e-6
    assert not report.details["head_untied"] and tied_head(even) == "lm_head.weight"


def test_a_step_that_fails_leaves_the_head_tied() -> None:
    model = tied()
    model.model.norm.register_forward_hook(lambda _, args, output: output + args[0].pow(2))
    wanted = logits(model)
    with pytest.raises(InterventionError, match="rotate: the logits of the rotated model are others"):
        apply(model, None, "rotate")
    assert torch.equal(logits(model), wanted)
    assert tied_head(model) == "lm_head.weight" and model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == tied().all_tied_weights_keys


def test_a_block_that_works_on_single_channels_is_noticed() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output.clamp(-0.1, 0.1))
    wanted = logits(model)
    with pytest.raises(InterventionError, match=r"rotate: model.layers.1 does not compute the same"):
        apply(model, None, "rotate")
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(("change", "stays"), [(clipped, True), (by_head, False)])
def test_what_stands_after_the_values_is_noticed(change: Callable[..., Tensor], stays: bool) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(change)
    wanted, before = logits(model), model.model.layers[1].self_attn.o_proj.weight.detach().clone()
    report = apply(model, None, "rotate")
    assert off(logits(model), wanted) < 2e-6
    # A norm over a head's channels commutes with its rotation.
    assert bool(report.warnings) == stays
    if stays:
        assert "the values of 1 of 2 blocks, such as model.layers.1, stay" in report.warnings[0]
    columns = (before.norm(dim=0), model.model.layers[1].self_attn.o_proj.weight.norm(dim=0))
    assert torch.allclose(*columns, rtol=1e-4) == stays


def test_a_stream_that_is_changed_before_the_first_block_is_noticed() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: output.clamp(min=0))
    with pytest.raises(InterventionError, match="rotate: rotated embeddings do not rotate the residual stream"):
        apply(model, None, "rotate")


def test_a_gain_of_zero(tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[::3] = 0
    wanted = logits(model)
    apply(model, None, "rotate")
    assert off(logits(model), wanted) < 2e-6
    biased = tiny_model("gptj")  # its q, k and v have no bias
    with torch.no_grad():
        biased.transformer.h[1].ln_1.weight[4] = 0
    with pytest.raises(InterventionError, match="has a bias where its gain is 0"):
        apply(biased, None, "rotate")


def test_offloaded_models_and_half_precision() -> None:
    plain, host = tied(), tied()
    offload(host, torch.device("cpu"))
    for model in (plain, host):
        apply(model, None, "rotate")
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), host.parameters(), strict=True))
    assert off(logits(host), logits(plain)) < 1e-6
    half, exact = tiny_model("llama", dtype=torch.float16), tiny_model("llama")
    apply(half, None, "rotate")
    assert half.model.embed_tokens.weight.dtype == torch.float16
    assert off(logits(half), logits(exact)) < 0.02


def test_a_quantiser_follows_and_twice_is_fine() -> None:
    model, wanted = tied(), logits(tied())
    for method, settings in (("rotate", {}), ("rotate", {}), ("rtn", {"bits": 8})):
        apply(model, None, method, None, **settings)  # type: ignore[arg-type]
    assert off(logits(model), wanted) < 0.02


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 576, 896])
def test_hadamard_matrices(n: int) -> None:
    H = find_hadamard(n)
    assert H is not None
    assert bool((H.abs() == 1).all()) and torch.equal(H @ H.t(), n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 45, 52, 92])
def test_widths_without_a_known_hadamard_matrix(n: int) -> None:
    assert find_hadamard(n) is None
    for keeps_mean in (False, True):
        Q, kind = random_rotation(n, torch.Generator().manual_seed(n), keeps_mean=keeps_mean)
        torch.testing.assert_close(Q @ Q.t(), torch.eye(n, dtype=torch.float64))
        assert kind.startswith("orthogonal")
        assert torch.allclose(Q.sum(dim=0), torch.ones(n, dtype=torch.float64)) == keeps_mean


def test_an_odd_width_is_rotated_too() -> None:
    config: Any = CONFIGS["llama"]()
    config.hidden_size, config.head_dim, config.num_key_value_heads = 45, 6, 4
    model = tiny_model(config)
    wanted = logits(model)
    assert apply(model, None, "rotate").details["matrices"] == {"stream": "orthogonal", "values": "orthogonal"}
    assert off(logits(model), wanted) < 2e-6
    assert model.vocab_size == VOCABULARY
