"""A job as the engine's process sees it; `engines/run.py` writes it and reads the answer."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

REPEATS = "LMCOMPOSE_ENGINE_REPEATS"
"""Environment variable: number of times to run the job; the report has the seconds of the fastest (for benchmarks)."""
PROBE_TOLERANCE = 0.05
"""Maximum relative difference: bfloat16 differs from float32 by about 0.01, another architecture by 1."""


class Refused(Exception):
    """The engine cannot run this job; the message follows 'the engine NAME'."""


@dataclass
class Job:
    """One method, its settings, a model's weights and the tokens to calibrate on."""

    folder: Path
    method: str
    settings: dict[str, Any]
    linears: list[str]
    seed: int
    threads: int
    rows: list[list[int]]
    probe: Tensor
    """(1, tokens) int64."""
    logits: Tensor
    """(1, tokens, vocabulary) float32: what the model says to the probe before the step."""

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read the job in `folder`."""
        job = json.loads((folder / "job.json").read_text())
        tokens = load_file(folder / "tokens.safetensors")
        rows = [ids[:length].tolist() for ids, length in zip(tokens["ids"], tokens["lengths"].tolist(), strict=True)]
        probe = load_file(folder / "probe.safetensors")
        return cls(folder=folder, rows=rows, probe=probe["ids"], logits=probe["logits"], **job)

    def model(self) -> Any:
        """Build the model in float32 and check that its logits match the original's."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.folder / "config")
        try:
            model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except (KeyError, ValueError) as error:
            raise Refused(f"does not know the model: {error}") from error
        model = model.float().eval()
        state = self.original()
        names = {name for name, _ in model.named_parameters()}
        if names != state.keys():
            odd = ", ".join(sorted(names ^ state.keys())[:5])
            raise Refused(f"has transformers {transformers.__version__}, where the model has other parameters: {odd}")
        model.load_state_dict(state, strict=False)
        difference = relative(self.answer_to_probe(model), self.logits)
        if not difference < PROBE_TOLERANCE:
            raise Refused(
                f"has transformers {transformers.__version__}, where the same weights compute something else "
                f"(relative difference of the logits {difference:.3g})"
            )
        config.use_cache = False
        return model

    @torch.no_grad()
    def answer_to_probe(self, model: nn.Module) -> Tensor:
        """Return a model's logits for the probe, (1, tokens, vocabulary) float32."""
        return model(input_ids=self.probe, use_cache=False).logits.float()  # type: ignore[no-any-return]

    def original(self) -> dict[str, Tensor]:
        """Return the weights before the step, float32."""
        return {name: value.float() for name, value in load_file(self.folder / "state.safetensors").items()}

    @torch.no_grad()
    def read_weights(self, model: nn.Module, unpack: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Return every parameter of a packed model; `unpack` returns the weight (out, in) of one packed layer."""
        original = self.original()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                weights[f"{name}.weight"] = unpack(module)
                if f"{name}.bias" in original:  # some engines add a bias to every packed layer
                    weights[f"{name}.bias"] = module.bias.detach().float().clone()
        return weights


@dataclass
class Result:
    """The result of a job."""

    weights: dict[str, Tensor]
    """Changed parameters by name, de-quantised."""
    logits: Tensor
    """Logits of the engine's own compressed model for the probe."""
    clock: Clock
    """Time of the engine's own work."""


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the relative difference of two tensors."""
    return float((found - wanted).norm() / wanted.norm())


def stand_in_tokenizer() -> Any:
    """Return a dummy tokenizer: engines require one, but the texts are already tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0}))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")  # type: ignore[no-untyped-call]


class Clock:
    """Measures the engine's own work, without imports and files."""

    def __enter__(self) -> Clock:
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start[0]
        self.cpu_seconds = time.process_time() - self.start[1]


def main(driver: Callable[[Job], Result], *distributions: str) -> None:
    """Run the job in the folder named on the command line; report the versions of `distributions`."""
    folder = Path(sys.argv[1])
    try:
        job = Job.read(folder)
        torch.manual_seed(job.seed)
        torch.set_num_threads(job.threads)
        result = driver(job)
        clocks = [result.clock, *(driver(job).clock for _ in range(int(os.environ.get(REPEATS, "1")) - 1))]
        original = job.original()
        changed = {
            name: value.detach().float().contiguous()
            for name, value in result.weights.items()
            if name.removesuffix(".weight") in job.linears or not torch.equal(value.float(), original[name])
        }
        save_file(changed, folder / "answer.safetensors")
        save_file({"logits": result.logits.float().contiguous()}, folder / "engine.safetensors")
        versions = {name: version(name) for name in (*distributions, "transformers", "torch")}
        report = {
            "versions": versions,
            "engine_seconds": min(clock.seconds for clock in clocks),
            "engine_cpu_seconds": min(clock.cpu_seconds for clock in clocks),
        }
        (folder / "answer.json").write_text(json.dumps(report))
    except Refused as error:
        (folder / "refused.json").write_text(json.dumps({"reason": str(error)}))
    except ImportError as error:
        traceback.print_exc()
        (folder / "refused.json").write_text(json.dumps({"reason": f"cannot be imported: {error}"}))
