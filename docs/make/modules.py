"""The public modules, in the groups of the reference. A test compares them with the modules whose examples are run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that share a page of the reference.

    Attributes:
        page: Name of the page.
        title: Its title.
        about: What is said at its head.
        modules: The modules, separated by spaces, without "jaxcomm.".
    """

    page: str
    title: str
    about: str
    modules: str


GROUPS = (
    Group(
        "models",
        "Models",
        "A model is a pytree of weights with its architecture, and pure functions over it.",
        "config model prompts cache reading decoding",
    ),
    Group(
        "messages",
        "Sites, edits, messages",
        "Read any site, edit any site, hand over what was read.",
        "sites edits messages communication controls lenses alignment",
    ),
    Group(
        "sweeps", "Sweeps and patching", "Every layer pair, or every site, at once.", "layer_sweep layer_sweep.patching"
    ),
    Group(
        "channels",
        "Channels and maps",
        "What is handed over besides one state, and maps between models.",
        "mapping kv_mapping prefixes latents cipher bridges",
    ),
    Group("agents", "Agents", "A model with its tokenizer: strings in, strings out.", "agent chat"),
    Group(
        "protocols",
        "Protocols",
        "Who says what to whom, in text. Each protocol returns a `Turn`.",
        "protocols.base protocols.controls protocols.text protocols.debates protocols.cipher protocols.activations "
        "protocols.prefixes protocols.state_deltas protocols.bridges protocols.inspections",
    ),
    Group("lmnet", "LMNet", "Networks of language models with trainable edges.", "lmnet.network lmnet.controls"),
    Group(
        "training",
        "Training, sharding, cost",
        "Training steps, LoRA, several devices, FLOPs.",
        "training lora sharding flops fingerprint",
    ),
    Group(
        "converters",
        "Checkpoints",
        "Hugging Face safetensors, GGUF and Orbax, to and from `Params`.",
        "converters.agents converters.hf converters.checkpoints converters.families converters.tensors converters.table "
        "converters.gguf.file",
    ),
    Group(
        "games",
        "Games and scores",
        "The games, how they are put, how answers are scored, and what a message did.",
        "evals.pair evals.agents evals.games.game evals.games.places evals.games.companies evals.games.wording evals.play "
        "evals.conditions evals.choices evals.scores evals.effects evals.injections evals.monitors",
    ),
    Group(
        "evaluation",
        "Evaluation and reports",
        "What the commands use to write reports.",
        "evals.cost evals.documents evals.sentences evals.biographies evals.processes evals.published evals.report "
        "evals.figures evals.inspection_figure evals.networks.texts",
    ),
)


def grouped(group: Group) -> list[str]:
    """Splits the modules of a group."""
    return group.modules.split()
