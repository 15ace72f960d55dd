"""Settings of a recipe's groups, apart from the methods' own (no torch, no Hydra)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from evaluators.settings import PassSettings, PerplexitySettings, QuestionSettings
from interventions.names import near_names
from interventions.ranges import Checked, Choice, Count, Items, Positive, shown
from pytest_lmcompose.world.readers import unknown_schema

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "host")
Names = Annotated[list[str], Items()]
NamesOrNone = Annotated[list[str], Items(least=0)]


@dataclass(frozen=True)
class ModelSettings(Checked):
    """Which model, and how it is loaded."""

    path: str = ""
    """A folder with config.json (relative ones: to the working folder, then to the suite's), or a hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Annotated[str, Choice(*DTYPES)] = "auto"
    """auto, float32, bfloat16 or float16; auto is float32 on a CPU, the checkpoint's own elsewhere."""
    trust_remote_code: bool = False
    device_map: Any = None
    """Where the weights are. null: all on the device; host: in the host's memory, each block on the device only while
    it is computed; auto, balanced, balanced_low_0, sequential, or a mapping from modules to devices: spread over
    devices by accelerate."""
    memory_budget: Positive | None = None
    """GiB. Of a model that is spread over GPUs: what its weights may take of each. Else: what a block that is being
    compressed may take on the device, with statistics and activations; the less, the smaller the batches."""

    def problems(self) -> Iterator[str]:
        """Yield a device map of another kind than accelerate takes."""
        where, places = f"device_map={shown(self.device_map)}", self.device_map
        if isinstance(places, Mapping):
            if not places or not all(isinstance(name, str) and _is_place(place) for name, place in places.items()):
                yield f"{where}: expected a mapping from modules to devices, such as 0, 'cuda:1' or 'cpu'"
        elif places is not None and places not in DEVICE_MAPS:
            near = near_names(places, DEVICE_MAPS) if isinstance(places, str) else ""
            yield f"{where}: expected one of {', '.join(DEVICE_MAPS)}, a mapping, or null.{near}".removesuffix(".")


@dataclass(frozen=True)
class WorldSettings(Checked):
    """The data of all methods and evaluators; a file that is null is one that this world lacks."""

    folder: str = ""
    """Relative ones: to the working folder, then to the suite's."""
    edits: str | None = None
    edits_schema: str = "zsre"
    """zsre, counterfact, mquake, or one that another package reads (`lmcompose.edit_readers`)."""
    strip_nq: bool = True
    """Remove zsRE's "nq question: " before locality prompts."""
    ask_as: str = "{}"
    """How a question of a mquake file is put, {} being the question: a base model needs more than a question mark."""
    facts: str | None = None
    """Prompts and answers for recall. Those whose relation is `topic/...`, of a topic of `forget`, count apart."""
    calibration: str | None = None
    retain: str | None = None
    forget: dict[str, str] = field(default_factory=dict)
    """Domain to file."""
    perplexity: str | None = None
    """Text that perplexity is measured on; never the retain or calibration text."""
    tasks: str | None = None
    """Folder of question tasks, as YAML files of lm-evaluation-harness."""
    pools: dict[str, Names] = field(default_factory=dict)
    """Pool of question tasks, such as harmless, to its tasks, groups or tags: of the folder, or of the harness
    itself (wmdp_bio, mmlu); accuracy is measured by task and by pool."""
    hazardous: NamesOrNone = field(default_factory=list)
    """Pools of knowledge that unlearning removes: the lower their accuracy, the better."""
    trust_code: bool = False
    """Let task files of the folder run code: functions that they name by `!function`, templates outside of a sandbox,
    and whatever else lm-evaluation-harness would run or import for them."""

    def problems(self) -> Iterator[str]:
        """Yield an unknown schema or hazardous pool, and a form of questions without the question."""
        if (problem := unknown_schema(self.edits_schema)) is not None:
            yield f"edits_schema={shown(self.edits_schema)}: {problem}"
        for pool in self.hazardous:
            if pool not in self.pools:
                known = ", ".join(self.pools) or "none"
                yield f"hazardous={pool}: no such pool.{near_names(pool, self.pools)} Known: {known}"
        if "{}" not in self.ask_as:
            yield f"ask_as={shown(self.ask_as)}: expected a text with {{}}, where the question stands"


@dataclass(frozen=True)
class EvaluateSettings(PerplexitySettings, QuestionSettings, PassSettings):
    """What is measured on each state, and on how much data."""

    edits: Count = 20
    """Facts that editing methods rewrite in one batch, and that are measured on every state."""
    editing: bool = True
    """Success, paraphrase, portability and locality of the edits."""
    recall: bool = True
    facts: Count | None = 500
    """Facts sampled for recall; null: all."""
    perplexity: bool = True
    """Of running text, of the edits' targets with and without their prompts, and of the facts' answers."""
    texts: Count | None = 200
    """Texts for perplexity, from the file's start; null: all."""
    questions: bool = True
    efficiency: bool = True
    """Average bits, sparsity and packed size, read from the weights, and operations by token."""
    latency: bool = False
    """Time of a forward pass and tokens by second, with dense kernels; noisy where the machine is shared."""
    batch_size: Count = 32
    """Sequences that are read at a time."""
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluators of other packages to run, each with the settings that are not to be at their defaults:
    {} for none."""


@dataclass(frozen=True)
class SuiteSettings(Checked):
    """Which compositions are tested."""

    compositions: NamesOrNone = field(default_factory=list)
    """Ids, such as `base`, `memit+awq`, `awq[bits=3]+memit`."""
    permute: NamesOrNone = field(default_factory=list)
    """Steps, such as `awq` or `awq[bits=3]`, of which every ordered choice is tested as well."""
    max_steps: Count | None = None
    """Longest ordered choice of `permute`; null: as long as there are steps for it."""
    across_categories: bool = False
    """Only choices whose steps are all of different categories."""


def _is_place(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
