"""Folders that a run writes: they load to the same model, are whole or absent, and say what they are."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from interventions import rounding
from interventions.checkpoint.reading.kinds import INDEX, WEIGHTS
from pytest_lmcompose.build.load import hash_weights
from pytest_lmcompose.checkpoints.folder import CARD, new_folder
from pytest_lmcompose.checkpoints.options import folder_name
from pytest_lmcompose.checkpoints.write import write_checkpoint
from pytest_lmcompose.errors import CheckpointError
from pytest_lmcompose.options import SUITE_FOLDER
from tests.models import _SIZE, CONFIGS, tiny_model

MOE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZE, num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SIZE, num_experts=8, moe_intermediate_size=16),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SIZE, num_key_value_heads=2, num_local_experts=4, head_dim=8),
    "llama4": lambda: transformers.Llama4TextConfig(**_SIZE, num_key_value_heads=2, num_local_experts=4, head_dim=8),
}
TIED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZE, tie_word_embeddings=True),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=_SIZE["vocab_size"], hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
FAMILIES = {**{name: CONFIGS[name] for name in ("gpt2", "llama", "gemma", "phi3", "opt", "gptj")}, **MOE, **TIED}
SHARD = 20_000
ROOT = Path(__file__).parents[2]


def load(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=options.pop("dtype", "auto"), **options)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23).unsqueeze(0), use_cache=False).logits
    return found


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def written(model: Any, tokenizer: Any, folder: Path, **options: Any) -> str:
    folder.mkdir()
    return write_checkpoint(folder, model, tokenizer, **options)


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_to_the_same_model(family: str, tokenizer: Any, tmp_path: Path) -> None:
    tiny_model(FAMILIES[family]()).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source")
    digest = written(model, tokenizer, tmp_path / "out", shard_bytes=SHARD)
    assert stored(tmp_path / "out") == stored(tmp_path / "source")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(again))
    assert digest == hash_weights(model) == hash_weights(again)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


def test_a_model_that_was_loaded_in_another_precision(tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1e-5
    written(model, tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.dtype == torch.float32 and torch.equal(logits(model), logits(again))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert model.config.dtype != torch.bfloat16  # what transformers has set


def test_the_files_of_the_embedded_model(tmp_path: Path) -> None:
    source = SUITE_FOLDER / "tinyworld" / "model"
    model, tokenizer = load(source), transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = ["Some words, 12 of them!", "a"]
    tokenizer(text, padding=True, truncation=True, max_length=4)
    written(model, tokenizer, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(text).input_ids == tokenizer(text).input_ids and again.chat_template == tokenizer.chat_template
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    state = json.loads(files["tokenizer.json"].read_text())
    assert state["padding"] is None and state["truncation"] is None
    assert {"generation_config.json", "config.json", "chat_template.jinja", WEIGHTS} <= set(files)
    assert INDEX not in files
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))


class Rounding:
    """Packs the linear layers of the blocks as whole numbers and a scale."""

    def __init__(self) -> None:
        self.config = {"quant_method": "rounding", "ignore": ["lm_head"]}
        self.rounding = rounding.Rounding()
        self.experts: dict[str, Any] = {}
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def packs(self, name: str) -> bool:
        return name.endswith("proj.weight")

    def replace(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        codes = (weight * 100).round().to(torch.int32)
        self.made.append(weakref.ref(codes))
        alive = [found.numel() * found.element_size() for made in self.made if (found := made()) is not None]
        self.most = max(self.most, sum(alive))
        return {name.replace("weight", "codes"): codes, name.replace("weight", "scale"): torch.tensor([0.01])}

    def beside(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def unpacked(self, name: str, weight: Tensor) -> Tensor:
        return (weight * 100).round().to(torch.int32) * torch.tensor(0.01)


def test_packed_weights_are_streamed_and_hashed_as_they_are_loaded(tokenizer: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SIZE | {"num_hidden_layers": 8})
    model, packing = tiny_model(config), Rounding()
    digest = written(model, tokenizer, tmp_path / "out", packing=packing, shard_bytes=SHARD)
    names = stored(tmp_path / "out")
    assert "model.layers.3.mlp.up_proj.codes" in names and "model.layers.3.mlp.up_proj.weight" not in names
    assert "model.layers.3.input_layernorm.weight" in names
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["quantization_config"] == packing.config
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if packing.packs(name):
                parameter.copy_(packing.unpacked(name, parameter))
    assert digest == hash_weights(model)
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    assert packing.most <= SHARD + block < sum(p.numel() * 4 for p in model.model.layers.parameters())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == names.keys()


# Folders


def put(target: Path, text: str) -> None:
    """Write one of our folders with one file."""
    with new_folder(target) as folder:
        (folder / "text").write_text(text)
        (folder / CARD).write_text('{"card_version": 1}')


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "some" / "where"
    put(target, "one")
    (target / "left").write_text("over")
    put(target, "two")
    assert names(target) == [CARD, "text"] and (target / "text").read_text() == "two"
    assert names(target.parent) == ["where"]
    (tmp_path / "link").symlink_to(target)
    put(tmp_path / "link", "three")
    assert (tmp_path / "link").is_symlink() and (target / "text").read_text() == "three"
    empty = tmp_path / "empty"
    empty.mkdir()
    put(empty, "four")
    assert names(empty) == [CARD, "text"]


def test_what_others_wrote_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    (tmp_path / "also").mkdir()
    (tmp_path / "also" / CARD).write_text('{"of": "another tool"}')
    for name, message in (("theirs", "not written by lmcompose"), ("file", "is a file"), ("also", "not written by")):
        with pytest.raises(CheckpointError, match=message):
            put(tmp_path / name, "mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        put(tmp_path / "file" / "below", "mine")
    assert names(theirs) == ["config.json"] and names(tmp_path) == ["also", "file", "theirs"]


def test_a_folder_of_another_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not written by"), new_folder(tmp_path / "out") as folder:
        (folder / "text").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_an_error_of_the_disk_is_one_line_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    put(tmp_path / "old", "one")
    for target in (tmp_path / "old", tmp_path / "not" / "yet"):
        with pytest.raises(CheckpointError) as caught, new_folder(target) as folder:
            (folder / "half").touch()
            raise OSError(code, os.strerror(code), "half")
        text = str(caught.value)
        assert text.startswith(f"{target} cannot be written: {os.strerror(code)}; ") and "\n" not in text
        assert ("free some space" in text) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert names(tmp_path) == ["old"] and (tmp_path / "old" / "text").read_text() == "one"


def test_other_errors_pass_on_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


WRITER = """
import os, sys, time
from pathlib import Path
from pytest_lmcompose.checkpoints import folder as module
target = Path(sys.argv[1])
def die(*_):
    os.kill(os.getpid(), 9)
if sys.argv[2] == "renaming":
    rename = os.rename
    def between(one, other):
        if Path(other) == target:
            die()
        rename(one, other)
    os.rename = between
with module.new_folder(target) as made:
    (made / "text").write_text("half")
    if sys.argv[2] == "writing":
        die()
    if sys.argv[2] == "waiting":
        print("ready", flush=True)
        time.sleep(60)
"""


def writer(target: Path, where: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(target), where]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_tidies_up(tmp_path: Path, where: str) -> None:
    target = tmp_path / "out"
    put(target, "one")
    killed = writer(target, where)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len([name for name in names(tmp_path) if name != "out"]) == 1
    if where == "writing":
        assert (target / "text").read_text() == "one"
    with pytest.raises(RuntimeError), new_folder(target):
        assert (target / "text").read_text() == "one"  # restored, if the writer had taken it away
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    put(target, "two")
    assert names(tmp_path) == ["out"] and (target / "text").read_text() == "two"


def test_the_folder_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = writer(target, "waiting")
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        put(target, "mine")
        assert len(names(tmp_path)) == 2
    finally:
        process.kill()
        process.communicate()
    put(target, "again")
    assert names(tmp_path) == ["out"]


FULL = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pytest_lmcompose.checkpoints.folder import new_folder
from pytest_lmcompose.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    with new_folder(Path(sys.argv[1])) as folder:
        save_file({"a": torch.zeros(100_000)}, folder / "model.safetensors")
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    # The system refuses files beyond a size, as it does on a full disk, in the middle of a write.
    command = [sys.executable, "-c", FULL, str(tmp_path / "new" / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path / 'new' / 'out'} cannot be written: "), done.stderr
    assert done.stdout.count("\n") == 1 and "free some space" in done.stdout
    assert names(tmp_path) == []


def test_names_of_folders_are_safe_and_distinct() -> None:
    ids = ["memit", "memit+awq", "awq[bits=3]", "awq[bits=4]", "awq[a='x/y']", "awq[a='x-y']", "+".join(["awq"] * 99)]
    found = [folder_name(name) for name in ids]
    assert found[:2] == ids[:2] and found[2].startswith("awq-bits=3-")
    assert len(set(found)) == len(ids)
    assert all(len(name) < 100 and not set(name) & set("/[]' ") for name in found)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found
"""


def test_the_code_of_a_model_travels_with_it(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    tokenizer.save_pretrained(source)
    (source / "own_code.py").write_text(OWN_CODE)
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    model = load(source, trust_remote_code=True)
    written(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "own_code.py").read_text() == OWN_CODE
    again = load(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "OwnModel" and torch.equal(logits(model), logits(again))
