"""Settings of a recipe's sections, except those of methods. Imports no torch and no Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from evaluators.settings import (
    PassSettings,
    PerplexitySettings,
    QuestionSettings,
    RefusalSettings,
    UnlearningSettings,
)
from interventions.names import near_names
from interventions.ranges import Checked, Choice, Count, Items, Positive, shown
from interventions.tokens import Chat
from pytest_lmcompose.data.readers import AUTO, unknown_schema
from pytest_lmcompose.data.refusal import SETS as REFUSAL_SETS
from pytest_lmcompose.data.source import source_problem
from pytest_lmcompose.data.templates import QA_TEMPLATE, template_problem

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "host")
SOURCES = (
    *("edits", "facts", "calibration", "retain", "perplexity", "verbatim"),
    *("preferences", "preferences_heldout"),
)
"""Keys of a world that take a source of data."""
TEXTS = ("calibration", "retain", "perplexity", "forget", "membership")
"""Keys whose texts may come from several sources."""
SOURCE_SETS: dict[str, tuple[str, ...]] = {
    "forget": (),
    "qa": ("forget", "retain", "real_authors", "world_facts"),
    "knowledge": ("forget", "retain"),
    "knowledge_examples": ("forget", "retain"),
    "membership": ("forget", "holdout"),
    "tuning": (),
    "tuning_heldout": (),
    "refusal": REFUSAL_SETS,
    "refusal_heldout": REFUSAL_SETS,
}
"""Keys of a world that take a mapping of sources, with the names that it may have; none: any."""
_OF_CHATS = frozenset({"conversation", "tokenize", "add_generation_prompt", "continue_final_message"})
"""Arguments of `apply_chat_template` that evaluators set."""
Names = Annotated[list[str], Items()]
NamesOrNone = Annotated[list[str], Items(least=0)]


@dataclass(frozen=True)
class ModelSettings(Checked):
    """The model and how to load it."""

    path: str = ""
    """A folder (relative to the working folder, then to the suite's), a GGUF file, or a hub id. The folder may hold a
    quantised model, or a PEFT adapter."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Annotated[str, Choice(*DTYPES)] = "auto"
    """auto means float32 on a CPU and the checkpoint's dtype elsewhere."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    device_map: Any = None
    """Where to keep the weights. null: on the device. host: in host memory, with each block on the device only while it
    runs. auto, balanced, balanced_low_0, sequential, or a mapping from modules to devices: spread over devices by
    accelerate."""
    memory_budget: Positive | None = None
    """Limit in GiB. With weights spread over GPUs: for the weights on each GPU. Otherwise: for a block during
    compression, with its statistics and activations; a lower limit means smaller batches."""

    def problems(self) -> Iterator[str]:
        """Yield an invalid device map."""
        where, places = f"device_map={shown(self.device_map)}", self.device_map
        if isinstance(places, Mapping):
            if not places or not all(isinstance(name, str) and _is_place(place) for name, place in places.items()):
                yield f"{where}: expected a mapping from modules to devices, such as 0, 'cuda:1' or 'cpu'"
        elif places is not None and places not in DEVICE_MAPS:
            near = near_names(places, DEVICE_MAPS) if isinstance(places, str) else ""
            yield f"{where}: expected one of {', '.join(DEVICE_MAPS)}, a mapping, or null.{near}".removesuffix(".")


@dataclass(frozen=True)
class WorldSettings(Checked):
    """The datasets of all methods and evaluators; null means that there is no such data.

    Edits, facts and texts come from a file, a folder in the hub's layout, or the hub; see `data.source.Source`. Texts
    can also come from a list of them, in turns.
    """

    folder: str = ""
    """Folder of the files; relative to the working folder, then to the suite's. Empty: the working folder."""
    edits: Any = None
    """Source of edits, in a format of `edits_schema`: a file, a folder in the hub's layout, a hub id, or a mapping."""
    edits_schema: str = AUTO
    """Format of the edits: zsre, counterfact, mquake, knowedit, or one of another package (`lmcompose.edit_readers`);
    auto recognises the first four."""
    strip_nq: bool = True
    """Remove zsRE's "nq question: " from the start of locality prompts."""
    ask_as: str = "{}"
    """Prompt for the questions of an mquake file; {} stands for the question."""
    facts: Any = None
    """Source of prompts and answers for recall. Facts with the relation `topic/...` for a topic of `forget` count
    separately."""
    calibration: Any = None
    """Source of calibration text for editing and compression methods."""
    retain: Any = None
    """Source of text that unlearning must not affect."""
    forget: dict[str, Any] = field(default_factory=dict)
    """Forget text: a source for each topic to unlearn."""
    qa: dict[str, Any] = field(default_factory=dict)
    """TOFU's question sets: sources for forget, retain, real_authors and world_facts. The fields are `question` and
    `answer`, for truth ratios also `perturbed_answer` and `paraphrased_answer`."""
    qa_template: str = QA_TEMPLATE
    """How a question and its answer are written, in `qa`, `knowledge`, and forget or retain text with the fields
    `question` and `answer` instead of `text`."""
    knowledge: dict[str, Any] = field(default_factory=dict)
    """MUSE's knowledge memorisation: sources of questions for forget and retain."""
    knowledge_examples: dict[str, Any] = field(default_factory=dict)
    """Sources of questions and answers to show before each question of `knowledge`, by the same names."""
    verbatim: Any = None
    """Source of MUSE's verbatim memorisation: beginnings of texts to forget, and how they go on, in the fields `prompt`
    and `gt`."""
    membership: dict[str, Any] = field(default_factory=dict)
    """MUSE's privacy leakage: sources of text for forget, which the model was trained on, and holdout, which it never
    saw."""
    refusal: dict[str, Any] = field(default_factory=dict)
    """Prompts whose difference gives the direction of refusal, or of another concept: sources for harmful (prompts with
    it) and harmless (prompts without). Known fields: `prompt`, `goal`, `behavior`, `instruction` and others; of a file
    of XSTest, each takes its own prompts."""
    refusal_heldout: dict[str, Any] = field(default_factory=dict)
    """Prompts to measure refusal on: sources for harmful and harmless, none of them in `refusal`."""
    retain_model: str | None = None
    """Model trained without the data to forget, for forget quality and privacy leakage: a folder or a hub id."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """Sets of prompts and answers to tune on: a source for each. The fields are `prompt` (or `question`) and `answer`
    (or `completion`), text or lists of messages, or `messages`."""
    tuning_heldout: dict[str, Any] = field(default_factory=dict)
    """Sources of other prompts and answers to measure on, by set."""
    preferences: Any = None
    """Source of preferences to tune on: `chosen` and `rejected` answers to a `prompt`, text or lists of messages.
    Without `prompt`, both lists start with the same messages."""
    preferences_heldout: Any = None
    """Source of other preferences to measure on."""
    perplexity: Any = None
    """Source of text for perplexity; must not overlap with the retain or calibration text."""
    tasks: str | None = None
    """Folder of question tasks: YAML files of lm-evaluation-harness."""
    pools: dict[str, Names] = field(default_factory=dict)
    """Tasks, groups or tags of each pool, such as harmless: from the folder, or from the harness itself (wmdp_bio,
    mmlu). Accuracy is measured per task and per pool."""
    hazardous: NamesOrNone = field(default_factory=list)
    """Pools with knowledge to unlearn: a lower accuracy is better."""
    thresholds: str = "relative.yaml"
    """File of thresholds: in `thresholds` of the presets' folder, beside the world's YAML file, or in its folder. The
    default has only bounds relative to the base model."""
    trust_code: bool = False
    """Let task files run code: functions named by `!function`, templates outside a sandbox, and anything else that
    lm-evaluation-harness would run or import for them."""

    def without_data(self) -> WorldSettings:
        """Return the settings that say how data are asked, without where they are: their content counts."""
        nothing: dict[str, Any] = {**dict.fromkeys(SOURCES), **{key: {} for key in SOURCE_SETS}}
        return replace(self, folder="", retain_model=None, thresholds="", **nothing)

    def sources(self) -> Iterator[tuple[str, Any]]:
        """Yield each source with its key; several of one key one by one."""
        given = {key: getattr(self, key) for key in SOURCES if getattr(self, key) is not None}
        given |= {f"{key}.{name}": value for key in SOURCE_SETS for name, value in getattr(self, key).items()}
        for key, value in given.items():
            several = isinstance(value, list) and value and key.partition(".")[0] in TEXTS
            yield from ((key, source) for source in (value if several else [value]))

    def problems(self) -> Iterator[str]:
        """Yield an unusable source, an unknown schema or pool, and a form of questions without the question."""
        for key, source in self.sources():
            if (problem := source_problem(key, source)) is not None:
                yield problem
        for key, sets in SOURCE_SETS.items():
            for name in getattr(self, key):
                if sets and name not in sets:
                    yield f"{key}.{name}: no such set.{near_names(name, sets)} Known: {', '.join(sets)}"
        yield from self._unlearning_problems()
        for name in REFUSAL_SETS:
            if self.refusal and name not in self.refusal:
                yield f"refusal.{name} is missing: a direction is the difference between two sets of prompts"
        if (problem := unknown_schema(self.edits_schema)) is not None:
            yield f"edits_schema={shown(self.edits_schema)}: {problem}"
        for pool in self.hazardous:
            if pool not in self.pools:
                known = ", ".join(self.pools) or "none"
                yield f"hazardous={pool}: no such pool.{near_names(pool, self.pools)} Known: {known}"
        if "{}" not in self.ask_as:
            yield f"ask_as={shown(self.ask_as)}: expected a text with {{}} in place of the question"

    def _unlearning_problems(self) -> Iterator[str]:
        """Yield a template without question or answer, and data that its counterpart is missing for."""
        if (problem := template_problem(self.qa_template)) is not None:
            yield f"qa_template={shown(self.qa_template)}: {problem}"
        for name in self.knowledge_examples:
            if name not in self.knowledge:
                yield f"knowledge_examples.{name}: there are no questions to show them before: set knowledge.{name}"
        for name, other in (("forget", "holdout"), ("holdout", "forget")):
            if name in self.membership and other not in self.membership:
                yield f"membership.{other} is missing: texts to forget are compared with texts never seen"


@dataclass(frozen=True)
class EvaluateSettings(PerplexitySettings, QuestionSettings, PassSettings, UnlearningSettings, RefusalSettings):
    """Evaluators to run on each state, and the amount of data."""

    edits: Count = 20
    """Number of edits: made in one batch and measured on every state."""
    editing: bool = True
    """Measure success, paraphrase, portability and locality of the edits."""
    recall: bool = True
    """Measure recall, the exact-match accuracy on facts."""
    facts: Count | None = 500
    """Number of facts sampled for recall; null: all."""
    perplexity: bool = True
    """Measure perplexity of running text, the edits' targets with and without prompts, and the facts' answers."""
    texts: Count | None = 200
    """Number of texts for perplexity, from the start of the file; null: all."""
    closeness: bool = True
    """Measure how close a state is to the base model: KL divergence and agreement of the most likely token on the texts
    for perplexity, and answers to facts and questions that changed."""
    questions: bool = True
    """Measure accuracy on question tasks."""
    unlearning: bool = True
    """Measure TOFU's and MUSE's metrics, on the data of them that the world has."""
    tuning: bool = True
    """Measure what the model learnt from tuning, on the world's held-out examples and preferences."""
    refusal: bool = True
    """Measure how many held-out prompts are refused, if the world has such prompts."""
    efficiency: bool = True
    """Measure average bits, sparsity, packed size and operations per token, read from the weights."""
    latency: bool = False
    """Measure the time of a forward pass and tokens per second with dense kernels; noisy on a shared machine."""
    batch_size: Count = 32
    """Sequences of 128 tokens per forward pass, more of shorter ones."""
    chat_template: bool = False
    """Put prompts of facts, edits and question tasks into the tokenizer's chat template; running text stays plain."""
    system_prompt: str = ""
    """System turn before each prompt in the chat template; empty: none."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Values of the chat template's own variables, such as {enable_thinking: false}. {chat_template: NAME} chooses one
    of several templates."""
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Third-party evaluators to run, with their settings; {} keeps the defaults."""

    @property
    def chat(self) -> Chat | None:
        """How prompts are put into the chat template; None: they are not."""
        return Chat(self.system_prompt, self.chat_template_args) if self.chat_template else None

    def problems(self) -> Iterator[str]:
        """Yield settings of a chat template that is off, and arguments that are not the template's."""
        for key in ("system_prompt", "chat_template_args"):
            if (value := getattr(self, key)) and not self.chat_template:
                yield f"{key}={shown(value)}: expected chat_template=true as well"
        if _OF_CHATS.intersection(self.chat_template_args):
            yield f"chat_template_args={shown(self.chat_template_args)}: expected values of the template's variables"


@dataclass(frozen=True)
class SuiteSettings(Checked):
    """The compositions to test."""

    compositions: NamesOrNone = field(default_factory=list)
    """Composition ids, such as `base`, `memit+awq` or `awq[bits=3]+memit`."""
    permute: NamesOrNone = field(default_factory=list)
    """Steps, such as `awq` or `awq[bits=3]`; every ordered selection of them is tested too."""
    max_steps: Count | None = None
    """Maximum number of steps in a selection; null: all steps."""
    across_categories: bool = False
    """Only test selections in which every step has another category."""


def _is_place(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
