"""The study's report: one document, and one table with every score."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence

import numpy as np

from jaxcomm.controls import derange, overlap

from .. import figures
from ..documents import Block as Part
from ..documents import Code, Heading, Items, Picture, Table, console, markdown, page, show
from ..effects import effect, holm, meaning, p_written, written
from ..published import read_published
from ..runs import surroundings
from ..scores import accuracy, mean, percent
from . import measure
from .analysis import OUTCOMES, RULES, cell_of, contrast, family
from .design import PREREGISTRATION, PRIMARY, Block
from .run import Study

OUTCOME = {"among": "log p(right | choices), nats", "choice": "decision, points"}
QUESTIONS = {
    "content": "1. Content: does B's answer depend on what A read?",
    "likelihood": "2. Use: does the message help B?",
    "early": "Lower half: does B's answer depend on what A read if j is in B's lower half?",
}
THREATS = (
    "Size. A result on one pair of models says nothing about larger ones. The skyline shows how well these models can play the "
    "game at all. If B cannot answer with the statement in its own prompt, no channel can help it.",
    "The last layer. If j is B's last layer, B's head reads A's state directly. B then says what A would say next, and uses "
    "nothing of its own prompt. So an effect at the last layer comes from A alone.",
    "Layers. They are chosen on other items of the same game and the same set-up. For another game they would have to be "
    "chosen again.",
    "Another item's message is a message of the same game. So content is what distinguishes the items, not what kind of game it is.",
    "The likelihood may change where no decision changes. Both are reported. The published tables count decisions only.",
    "Landmarks of Countries are famous. A model may know the country of a place, but not the place's name in the wording of a game.",
    "Items of one game share their wording. Intervals are over items, not over wordings, models or seeds.",
)


def report(study: Study, blocks: Sequence[Block], command: str) -> None:
    """Writes report.html, report.md, pictures and results.csv into the run folder, and prints the report.

    Args:
        study: The study.
        blocks: The measurements, one block for each game and set-up.
        command: The command line that runs it again.

    Raises:
        OSError: A file cannot be written.
    """
    parts = list(document(study, blocks, command))
    show(parts[:-2], console(170))  # all but the pre-registration
    put = study.folder.put
    for part in parts:
        if isinstance(part, Picture):
            put(part.file, part.png)
    put("results.csv", table(blocks).encode())
    put("report.html", page(f"Study: {study.a.name} -> {study.b.name}", parts).encode())
    put("report.md", markdown(parts).encode())
    print(f"\n{study.folder.path}: report.html, report.md, pictures, results.csv")


def document(study: Study, blocks: Sequence[Block], command: str) -> Iterator[Part]:
    """Writes the report.

    Args:
        study: The study.
        blocks: The measurements, one block for each game and set-up.
        command: The command line that runs it again.

    Yields:
        The parts of the document.
    """
    yield Heading(1, f"Do activations carry content? {study.a.name} -> {study.b.name}")
    yield (
        "Model A reads a fact. B reads a question about the fact, but not the fact. B is paused after layer j, and its "
        "last-token state is replaced by A's state after layer k. Does B's answer depend on the fact, and does that help?"
    )
    yield Heading(2, "In short")
    yield Items(list(short(blocks)))
    yield Heading(2, "Set-up")
    yield Items(list(set_up(study, blocks)))
    for rule, title in QUESTIONS.items():
        yield from registered(blocks, rule, title)
    yield from maps_drawn(blocks)
    yield from exploratory(blocks)
    yield from published(blocks)
    yield Heading(2, "Threats to validity")
    quantised = [
        agent.name for agent in (study.a, study.b) if agent.name.startswith("real:") or agent.name.endswith(".gguf")
    ]
    yield Items([*THREATS, *(f"Weights. {name} is read from a quantised file." for name in dict.fromkeys(quantised))])
    yield Heading(2, "Command")
    yield Code(command)
    yield "The command contains seeds and settings. results.csv contains every score of every item. The pre-registration:"
    yield Code(PREREGISTRATION.read_text(encoding="utf-8"))


def short(blocks: Sequence[Block]) -> Iterator[str]:
    """Summarises the results of the tests, by the registered rules.

    Args:
        blocks: The measurements, one block for each game and set-up.

    Yields:
        One sentence for each question, and for each unit.
    """
    verdicts = {
        ("content", "among"): "Content reaches B's answer (own message above another item's, log p(right | choices))",
        ("content", "choice"): "Content changes B's decisions (own message above another item's)",
        ("likelihood", "among"): "B's answer becomes likelier than without a message",
        ("likelihood", "choice"): "B decides better than without a message",
        ("early", "among"): "Content reaches B's answer where j is in B's lower half (not registered)",
    }
    for (rule, outcome), text in verdicts.items():
        tests = [(block, found, p) for block, what, found, p in family(blocks, rule) if what == outcome]
        if not tests:
            continue
        sure = [(block, found) for block, found, p in tests if p < 0.05 and found.value.value > 0]
        line = f"{text}: in {len(sure)} of {len(tests)} set-ups"
        if sure:
            block, most = max(sure, key=lambda pair: pair[1].value.value)
            line += f"; most in {block.game.name}, {block.setup.name}: {written(most.value, OUTCOMES[outcome])} {OUTCOMES[outcome]}"
            last = [block for block, _ in sure if cell_of(block.cells, PRIMARY, rule).j == block.layers[PRIMARY][1][-1]]
            line += f"; in {len(last)} of them j is B's last layer" if last else ""
        harmed = sum(p < 0.05 and found.value.value < 0 for _, found, p in tests)
        yield line + (f"; the opposite in {harmed}." if harmed else ".")


def set_up(study: Study, blocks: Sequence[Block]) -> Iterator[str]:
    """Describes the games, the agents, and the set-ups.

    Args:
        study: The study.
        blocks: The measurements, one block for each game and set-up.

    Yields:
        One sentence for each fact.
    """
    for name, agent in (("A", study.a), ("B", study.b)):
        config = agent.single.config
        yield f"{name}: {agent.name}, {config.layers} layers of width {config.width}, {agent.params.dtype.name}."
    left_out = [form for form in ("raw", "chat") if form not in study.prompts]
    if left_out:
        yield f"Set-ups with {left_out[0]} prompts were left out (--prompts)."
    elif not any(block.setup.form == "chat" for block in blocks):
        yield "No chats: one of the models has no chat template."
    if not measure.same_shape(study.a, study.b):
        yield (
            "The models have different shapes. Without W, states of unequal width are grafted by the paper's rule. Single sites, "
            "keys and values and latent thoughts are left out."
        )
    for name in dict.fromkeys(block.game.name for block in blocks):
        game = next(block.game for block in blocks if block.game.name == name)
        half = len(game.items) // 2
        answers = [item.answer for item in game.items[half:]]
        same = overlap(answers, derange(answers, study.settings.seed))
        yield (
            f"{name}: layers are chosen on {half} items, results are reported on {len(game.items) - half} others; "
            f"{len(game.choices(game.items[0]))} choices, seed {study.settings.seed}. "
            f"For {same:.0%} of the items, the other item has the same answer."
        )
    ks, js = blocks[0].layers[PRIMARY]
    yield f"Layers k: {', '.join(map(str, ks))}. Layers j: {', '.join(map(str, js))}."
    digest = hashlib.sha256(PREREGISTRATION.read_bytes()).hexdigest()
    yield f"Pre-registration: evals/study/preregistration.md, SHA-256 {digest}."
    yield ", ".join(f"{name} {value}" for name, value in surroundings().items()) + "."


def registered(blocks: Sequence[Block], rule: str, title: str) -> Iterator[Part]:
    """Writes a family of tests.

    Args:
        blocks: The measurements, one block for each game and set-up.
        rule: The family (`analysis.family`).
        title: The question.

    Yields:
        A heading, a table, and an explanation of its numbers.
    """
    tests = family(blocks, rule)
    if not tests:
        return
    against = "no message" if rule == "likelihood" else "another item's message"
    rows = []
    for block, outcome, found, p in tests:
        cell = cell_of(block.cells, PRIMARY, rule)
        other = "silent" if rule == "likelihood" else f"{cell.label}, other"
        shown = [score(block, label, outcome) for label in (cell.label, other)]
        smallest = found.smallest(len(tests)) * (100 if OUTCOMES[outcome] == "points" else 1)
        told = block.game.name, block.setup.name, OUTCOME[outcome], f"{cell.k}, {cell.j}"
        rows.append([*told, *shown, written(found.value, OUTCOMES[outcome]), p_written(p), f"{smallest:.2g}"])
    yield Heading(2, f"{title} ({'exploratory' if rule == 'early' else 'registered'})")
    yield f"Layers are chosen on the first half: {RULES[rule]}. On the second half, the item's own message is compared with {against}."
    columns = ["game", "set-up", "outcome", "k, j", "own message", against, "difference", "p", "smallest"]
    yield Table(columns, rows, left=3)
    yield meaning(len(tests), per_row=1)


def score(block: Block, label: str, outcome: str) -> str:
    """Writes a score of a condition: a mean in nats, or a share in %.

    Args:
        block: The block.
        label: Label of the condition.
        outcome: The outcome.

    Returns:
        The text; empty if the condition has no such score.
    """
    values = block.scores.get(label, {}).get(outcome)
    if values is None or not len(values):
        return ""
    return f"{mean(values).value:.2f}" if outcome == "among" else percent(accuracy(values))


def maps_drawn(blocks: Sequence[Block]) -> Iterator[Part]:
    """Draws content over the layers, with a map for each set-up, and names the layers that both rules chose.

    Args:
        blocks: The measurements, one block for each game and set-up.

    Yields:
        A heading, a picture for each game, and a sentence.
    """
    yield Heading(2, "Content at every layer pair (first half)")
    yield "Mean log-probability of the right answer with an item's own message, minus that with another item's message, in nats."
    for game in dict.fromkeys(block.game.name for block in blocks):
        drawn = []
        for block in blocks:
            if block.game.name == game:
                found, (ks, js), cell = (
                    block.maps[PRIMARY],
                    block.layers[PRIMARY],
                    cell_of(block.cells, PRIMARY, "content"),
                )
                values = (found["own"] - found["other"]).mean(axis=-1)
                drawn.append(figures.LayerMap(block.setup.name, values, ks, js, (cell.k, cell.j)))
        png = figures.layer_maps(drawn, label="content, nats", columns=min(3, len(drawn)))
        yield Picture(f"content-{game}.png", png, f"{game}: content at every layer pair")


def exploratory(blocks: Sequence[Block]) -> Iterator[Part]:
    """Writes the exploratory results, which were not registered: every condition of every set-up.

    Args:
        blocks: The measurements, one block for each game and set-up.

    Yields:
        A table for each game and set-up.
    """
    yield Heading(2, "All conditions (exploratory)")
    yield (
        "Total: the condition minus B alone. Content: own message minus another item's message, if that was played. Decisions are "
        "in %, differences in nats of log p(right | choices). p-values are by random signs, corrected by Holm's method over each table. "
        "GFLOPs and bytes are counted until B's answer begins."
    )
    written_down = [name for name in ("exact", "found") if any(name in x for b in blocks for x in b.scores.values())]
    if written_down:
        yield "Exact and found match score the written replies."
    for block in blocks:
        yield Heading(3, f"{block.game.name}, {block.setup.name}")
        labels = [label for label in block.scores if not label.endswith(", other")]
        content = {x: contrast(block, x, f"{x}, other", "among") for x in labels if f"{x}, other" in block.scores}
        total = {x: effect(block.scores[x]["among"], block.scores["silent"]["among"]) for x in labels[1:]}
        ps = iter(holm([found.p for x in labels for found in (total.get(x), content.get(x)) if found is not None]))
        rows = []
        for label in labels:
            row = [label, *(score(block, label, name) for name in ("choice", *written_down, "among"))]
            for found in (total.get(label), content.get(label)):
                row += ["", ""] if found is None else [written(found.value, "nats"), p_written(next(ps))]
            costs = [block.scores[label].get(name) for name in ("flops", "sent")]
            row += ["" if x is None else f"{x.mean() / scale:,.3g}" for x, scale in zip(costs, (1e9, 1), strict=True)]
            rows.append(row)
        columns = ["condition", "decision", *written_down, "log p", "total", "p", "content", "p", "GFLOPs", "bytes"]
        yield Table(columns, rows, left=1)


def published(blocks: Sequence[Block]) -> Iterator[Part]:
    """Compares the accuracy of written replies with the paper's and KVComm's figures.

    Args:
        blocks: The measurements, one block for each game and set-up.

    Yields:
        A heading, caveats, and the table.
    """
    protocols = {"single": "silent", "skyline": "skyline", "message": "message", "activation": None}
    yield Heading(2, "Comparison with published figures")
    yield (
        "Shares in %. Published: exact string match (Ramesh & Li) or token F1 above 0.5 (KVComm), their own items, models of 3 to 8 "
        "billion parameters, one pair of layers for all. Here: decisions among the choices, at layers chosen by likelihood on other items. "
        "The replies of small models are seldom an exact match."
    )
    rows = []
    for entry in read_published()[1]:
        if entry.task in ("countries", "tip_sheets") and entry.protocol in protocols:
            rows.append(
                [
                    entry.source,
                    entry.pair,
                    f"{entry.protocol} {entry.variant}".strip(),
                    entry.task,
                    f"{100 * entry.share:.1f}",
                ]
            )
    for block in blocks:
        label = cell_of(block.cells, PRIMARY, "likelihood").label
        for name in ("silent", "skyline", "message", label):
            if name in block.scores:
                share = f"{100 * float(np.mean(block.scores[name]['choice'])):.1f}"
                rows.append(["here", block.setup.name, name, block.game.name, share])
    yield Table(["source", "pair or set-up", "condition", "game", "%"], rows, left=4)


def table(blocks: Sequence[Block]) -> str:
    """Lists every score of every item.

    Args:
        blocks: The measurements, one block for each game and set-up.

    Returns:
        A CSV file: game, set-up, condition, item (counted over both halves), and the scores.
    """
    file = io.StringIO()
    names = [name for name in measure.SCORES if any(name in own for block in blocks for own in block.scores.values())]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["game", "setup", "condition", "item", *names])
    for block in blocks:
        half = len(block.game.items) // 2
        for label, scores in block.scores.items():
            for n in range(len(scores["among"])):
                values = [f"{scores[name][n]:.6g}" if name in scores else "" for name in names]
                writer.writerow([block.game.name, block.setup.name, label, half + n, *values])
    return file.getvalue()
