"""The step `merge` against dense formulations of the published formulas, and everything that it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from interventions import InterventionError, apply
from interventions.context import OtherState
from interventions.merge.kernels.formulas import masked, random_mask
from interventions.merge.merge import MergeSettings
from interventions.ranges import SettingError
from tests.models import CONFIGS, tiny_model, tiny_tokenizer

Weights = dict[str, np.ndarray[Any, Any]]
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock", "sce")


def weights(model: Any, *, double: bool = True) -> Weights:
    return {
        n: p.detach().float().numpy().astype(np.float64 if double else np.float32) for n, p in model.named_parameters()
    }


def tuned(config: Any, seed: int) -> Any:
    """Return the model of seed 0, whose weights a fine-tune has moved."""
    model, noise = tiny_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * seed * parameter.abs().mean() * torch.randn(parameter.shape, generator=noise))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model, and of fine-tunes `a` to `c` of it."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "a", "b", "c")):
        (tuned("llama", seed) if seed else tiny_model()).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


def merged(folders: dict[str, Path], start: str, names: str, *, base: bool = True, **settings: Any) -> Weights:
    """Return the weights of `start` after it was merged with the folders `names`."""
    model = loaded(folders[start])
    if base:
        settings["base"] = str(folders["start"])
    apply(model, None, "merge", with_=[str(folders[name]) for name in names], **settings)
    return weights(model)


def close(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=2e-5, atol=2e-6, err_msg=name)


def each(function: Callable[..., Any], *models: Weights) -> Weights:
    return {name: function(*(model[name] for model in models)) for name in models[0]}


@pytest.fixture(scope="module")
def w(folders: dict[str, Path]) -> dict[str, Weights]:
    return {name: weights(loaded(folder)) for name, folder in folders.items()}


def test_linear(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    close(merged(folders, "a", "b", base=False, method="linear"), each(lambda a, b: (a + b) / 2, w["a"], w["b"]))
    found = merged(folders, "a", "bc", base=False, method="linear", weight=[1, 2, -0.5], normalize=False)
    close(found, each(lambda a, b, c: a + 2 * b - 0.5 * c, w["a"], w["b"], w["c"]))


def test_slerp_keeps_the_norm_between_vectors_of_equal_norm(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    def dense(a: Any, b: Any) -> Any:
        angle = math.acos(float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())))
        return (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)

    found = merged(folders, "a", "b", base=False, method="slerp", t=0.3)
    curved = {n for n in w["a"] if 1 - np.corrcoef(w["a"][n].ravel(), w["b"][n].ravel())[0, 1] > 0.01}
    assert len(curved) > 10
    close({n: found[n] for n in curved}, {n: dense(w["a"][n], w["b"][n]) for n in curved})


def test_task_arithmetic_adds_differences_from_the_base(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    wanted = each(lambda s, a, b: s + 0.5 * (0.6 * (a - s) + 0.9 * (b - s)), w["start"], w["a"], w["b"])
    close(merged(folders, "a", "b", method="task_arithmetic", weight=[0.6, 0.9], lambda_=0.5), wanted)
    # The base itself is no task vector; its weight in a list of all models is not used.
    close(merged(folders, "start", "ab", method="task_arithmetic", weight=[0.6, 0.9], lambda_=0.5), wanted)
    close(merged(folders, "start", "ab", method="task_arithmetic", weight=[7, 0.6, 0.9], lambda_=0.5), wanted)


def ties(start: Any, *tuned: Any, density: float, shares: tuple[float, ...]) -> Any:
    """Trim, elect and average, entry by entry (Yadav et al., 2023, algorithm 1), with weighted models."""
    vectors = []
    for share, values in zip(shares, tuned, strict=True):
        vector = (values - start).ravel()
        order = sorted(range(vector.size), key=lambda i: -abs(np.float32(vector[i])))
        vector[order[int(density * vector.size) :]] = 0
        vectors.append(share * vector)
    found = np.zeros(start.size)
    for i in range(start.size):
        sign = 1 if sum(vector[i] for vector in vectors) >= 0 else -1
        agree = [k for k, vector in enumerate(vectors) if vector[i] * sign > 0]
        if agree:
            found[i] = sum(vectors[k][i] for k in agree) / sum(shares[k] for k in agree)
    return start + found.reshape(start.shape)


def test_ties(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    found = merged(folders, "a", "bc", method="ties", density=0.25, weight=[0.6, 0.9, 1.2])
    some = [n for n in found if "layers.1" in n or "norm" in n]
    wanted = {n: ties(*(w[m][n] for m in ("start", *"abc")), density=0.25, shares=(0.6, 0.9, 1.2)) for n in some}
    close({n: found[n] for n in some}, wanted)


def test_model_stock_moves_by_the_angle_between_task_vectors(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    def dense(start: Any, *tuned: Any) -> Any:
        vectors = [(values - start).ravel() for values in tuned]
        pairs = [(0, 1), (0, 2), (1, 2)][: 3 if len(tuned) == 3 else 1]
        norms = [np.linalg.norm(vector) for vector in vectors]
        cosine = np.mean([vectors[i] @ vectors[j] / max(norms[i] * norms[j], 1e-6) for i, j in pairs])
        share = len(tuned) * cosine / (1 + (len(tuned) - 1) * cosine)
        return share * sum(tuned) / len(tuned) + (1 - share) * start

    close(merged(folders, "a", "bc", method="model_stock"), each(dense, w["start"], w["a"], w["b"], w["c"]))
    found = merged(folders, "start", "ab", method="model_stock", filter_wise=True)
    rows = {
        n: np.stack([dense(*r) for r in zip(w["start"][n], w["a"][n], w["b"][n], strict=True)])
        for n in found
        if w["a"][n].ndim == 2
    }
    close({n: found[n] for n in rows}, rows)


def test_sce_selects_by_variance_and_weighs_by_squares(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    def dense(start: Any, *tuned: Any) -> Any:
        vectors = np.stack([(values - start).ravel() for values in tuned])
        variance = vectors.var(axis=0)
        chosen = np.argsort(-variance)[: int(0.4 * (variance > 0).sum())]
        mask = np.zeros(start.size)
        mask[chosen] = 1
        vectors = vectors * mask
        squares = (vectors**2).mean(axis=1)
        shares = squares / squares.sum()
        sign = np.where(vectors.sum(axis=0) >= 0, 1, -1)
        agree = (vectors * sign > 0) * shares[:, None]
        return start + ((vectors * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1e-6)).reshape(start.shape)

    close(merged(folders, "a", "bc", method="sce", density=0.4), each(dense, w["start"], w["a"], w["b"], w["c"]))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_keeps_the_sum(method: str, folders: dict[str, Path], w: dict[str, Weights]) -> None:
    """With one task vector: a share of the entries, all scaled by one number, which the settings choose."""
    for rescale, factor in (("none", 1.0), ("density", 1 / 0.3), (None, None)):
        found = merged(folders, "start", "a", method=method, density=0.3, rescale=rescale)
        kept = total = 0
        for name, values in found.items():
            vector, now = w["a"][name] - w["start"][name], values - w["start"][name]
            there = np.abs(now) > 1e-7
            kept, total = kept + there.sum(), total + there.size
            ratio = now[there] / vector[there]
            wanted = np.abs(vector).sum() / np.abs(vector[there]).sum() if factor is None else factor
            np.testing.assert_allclose(ratio, wanted, rtol=2e-2)
        assert kept / total == pytest.approx(0.3, abs=0.01)
    again = merged(folders, "start", "a", method=method, density=0.3)
    assert all((again[name] == found[name]).all() for name in found)
    other = merged(folders, "start", "a", method=method, density=0.3, seed=1)
    assert any((other[name] != found[name]).any() for name in found)


def test_dare_drops_other_entries_of_each_model(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    one = merged(folders, "start", "ab", method="dare_linear", density=0.5, weight=[1, 0], rescale="none")
    two = merged(folders, "start", "ab", method="dare_linear", density=0.5, weight=[0, 1], rescale="none")
    both = merged(folders, "start", "ab", method="dare_linear", density=0.5, rescale="none")
    close(both, each(lambda s, a, b: a + b - s, w["start"], one, two))
    name = "model.layers.0.mlp.up_proj.weight"
    masks = [model[name] != w["start"][name] for model in (one, two)]
    assert (masks[0] & masks[1]).mean() == pytest.approx(0.25, abs=0.05)


def test_dare_is_unbiased() -> None:
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    masks = [random_mask(delta, 0.2, torch.Generator().manual_seed(seed)) for seed in range(400)]
    for rescale in ("density", "l1"):
        mean = torch.stack([masked(delta, mask, rescale, 0.2) for mask in masks]).mean(dim=0)
        assert float((mean - delta).norm() / delta.norm()) == pytest.approx(math.sqrt(0.8 / 0.2 / 400), rel=0.1)


def test_numbers_are_interpolated_over_the_depth(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"num_hidden_layers": 4})
    for seed, name in enumerate(("start", "a", "b")):
        (tuned(config, seed) if seed else tiny_model(config)).save_pretrained(tmp_path / name)
    a, b = (weights(loaded(tmp_path / name)) for name in "ab")
    folders = {name: tmp_path / name for name in ("start", "a", "b")}
    found = merged(folders, "a", "b", base=False, method="linear", weight=[[0, 1, 0], 1], normalize=False)
    shares = {0: 0.0, 1: 2 / 3, 2: 2 / 3, 3: 0.0}
    for name in found:
        share = shares[int(name.split(".")[2])] if ".layers." in name else 0.0
        np.testing.assert_allclose(found[name], share * a[name] + b[name], rtol=1e-5, atol=1e-6)
    every = merged(folders, "a", "b", base=False, method="slerp", t=[0, 1])
    assert (every["model.layers.0.mlp.up_proj.weight"] == a["model.layers.0.mlp.up_proj.weight"]).all()
    np.testing.assert_allclose(
        every["model.layers.3.mlp.up_proj.weight"], b["model.layers.3.mlp.up_proj.weight"], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_result_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model, other = tuned("llama", 1).to(dtype), tuned("llama", 2).to(torch.bfloat16)
    other.save_pretrained(tmp_path)
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    wanted = {name: ((one.float() + two.float()) / 2).to(dtype) for (name, one), two in pairs}
    apply(model, None, "merge", method="linear", with_=str(tmp_path))
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("ours", [True, False])
def test_heads_that_are_tied_in_one_model_only(ours: bool, tmp_path: Path) -> None:
    """A head of its own in any model makes one in the result."""

    def config(tied: bool) -> Any:
        return transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": tied})

    model, other = tiny_model(config(ours)), tuned(config(not ours), 1)
    before = model.get_output_embeddings().weight.detach().clone()
    wanted = (before + other.get_output_embeddings().weight) / 2
    other.save_pretrained(tmp_path / "other")
    apply(model, None, "merge", method="linear", with_=str(tmp_path / "other"))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(model.get_output_embeddings().weight, wanted)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged").get_output_embeddings().weight, wanted)


def test_a_failed_merge_leaves_the_model_as_it_was(tmp_path: Path, folders: dict[str, Path]) -> None:
    tied = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"tie_word_embeddings": True})
    model, broken = tiny_model(tied), tuned("llama", 1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    broken.save_pretrained(tmp_path)
    before = weights(model)
    with pytest.raises(InterventionError, match=r"left NaN or infinity in model\.norm\.weight"):
        apply(model, None, "merge", method="linear", with_=str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert all((values == before[name]).all() for name, values in weights(model).items())


def test_states_of_a_run(folders: dict[str, Path], w: dict[str, Weights]) -> None:
    def state(name: str) -> OtherState:
        return OtherState({n: p.detach() for n, p in loaded(folders[name]).named_parameters()}, name * 4)

    model, states = loaded(folders["a"]), {"base": state("start"), "ft+lora": state("b")}
    report = apply(model, None, "merge", method="task_arithmetic", with_="ft+lora", states=states)
    close(weights(model), each(lambda s, a, b: a + b - s, w["start"], w["a"], w["b"]))
    assert report.details["contents"] == {"ft+lora": "bbbb", "base": "startstartstartstart"}
    assert report.settings["with"] == "ft+lora" and report.settings["lambda"] == 1.0
    assert all((p.numpy() == w["b"][n]).all() for n, p in states["ft+lora"].parameters.items())  # not written
    with pytest.raises(InterventionError, match=r"merge: ft\+lora is a composition, which only a run builds"):
        apply(loaded(folders["a"]), None, "merge", method="linear", with_="ft+lora")
    with pytest.raises(InterventionError, match="merge: base is a composition, which only a run builds"):
        apply(loaded(folders["a"]), None, "merge", with_=str(folders["b"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density=0: expected a number above 0 to 1"),
        ({"density": 1.5}, "density=1.5: expected a number above 0 to 1"),
        ({"density": [0.5, [0.2, 0]]}, "density=0: expected"),
        ({"density": float("nan")}, "density=nan: expected"),
        ({"weight": "much"}, "weight=much: expected a number"),
        ({"weight": []}, r"weight=\[\]: expected a number"),
        ({"method": "slerp", "t": 1.1}, "t=1.1: expected a number from 0 to 1"),
        ({"method": "slerp", "with_": ["./a", "./b"]}, "slerp merges two models"),
        ({"method": "linear", "weight": [1, -1]}, "expected weights whose sum is not 0"),
        ({"with_": ["./a", "./a"]}, "expected every model once"),
        ({"with_": 3}, "with=3: expected a text, or a list of texts"),
        ({"method": "tie"}, "method=tie: expected one of linear"),
        ({"base": " "}, "base is empty"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MergeSettings(**settings)


def test_models_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        model = loaded(folders["a"])
        before = weights(model)
        with pytest.raises(InterventionError) as caught:
            apply(model, tiny_tokenizer(), "merge", **{"method": "linear"} | settings)
        assert all((values == before[name]).all() for name, values in weights(model).items())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    b, start = str(folders["b"]), str(folders["start"])
    assert "with is empty: name a folder" in refused()
    assert "no such folder" in refused(with_="./nowhere")
    assert "has the weights that the model has already" in refused(with_=str(folders["a"]))
    assert f"with={start} has the weights of base={start}" in refused(method="ties", with_=start, base=start)
    assert "expected one number, or a list of 2" in refused(with_=b, weight=[1, 2, 3])
    assert "model_stock needs at least two models" in refused(
        method="model_stock", with_=str(folders["a"]), base=str(folders["a"])
    )
    assert "method=slerp does not use it; it uses t" in refused(method="slerp", with_=b, density=0.5)
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert "is a GPT2LMHeadModel, but the model is a LlamaForCausalLM" in refused(with_=str(tmp_path / "gpt2"))
    wide = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"vocab_size": 400})
    tiny_model(wide).save_pretrained(tmp_path / "wide")
    assert "has a vocabulary of 400 tokens, but the model has one of" in refused(with_=str(tmp_path / "wide"))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(with_=str(tmp_path / "empty"))


def test_an_identity_follows_the_contents(folders: dict[str, Path], tmp_path: Path) -> None:
    def identity(**settings: Any) -> str:
        return json.dumps(MergeSettings(**settings).identity(folders["a"].parent)["contents"])

    assert identity(with_="./a", base="./start") == identity(with_=str(folders["a"]), base=str(folders["start"]))
    assert identity(with_="./a", base="./start") != identity(with_="./b", base="./start")
    assert identity(with_="./a", base="./start") != identity(with_="./a", base="./b")
    assert identity(with_="./a", method="linear", base="./start") == identity(with_="./a", method="linear")
    assert identity(with_=["./a", "./b"]) != identity(with_=["./b", "./a"])
