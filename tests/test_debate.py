"""CIPHER and debates against renderings in plain PyTorch and transformers: what agents read, write and score, in text and in
expected embeddings. The oracles keep no cache, pad nothing and take one question at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxcomm.cipher import THRESHOLDS, Mixing, cipher
from jaxcomm.decoding import Sampling
from jaxcomm.evals.pair import folder
from jaxcomm.prompts import left_pad
from jaxcomm.protocols import FORMS, Form, cipher_debate, debate
from jaxcomm.protocols.base import start_turn
from jaxcomm.reading import prefill

from conftest import assert_close
from speakers import (
    BOS,
    EOS,
    GAMES,
    OTHERS,
    QUESTIONS,
    TEXTS,
    WORDS,
    N,
    Speaker,
    assert_scored,
    greedy,
    ids,
    log_likelihood,
    spell,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]


# --- CIPHER: one agent ---


def torch_cipher(model, inputs, steps, temperature, *, tables=(), vocab=None, stop="none", stops=(), keep=(), mix=None):
    """Expected embeddings as a PyTorch user writes them: every step reads everything again. inputs [P, D]: rows of the
    embedding matrix. keep: logits processors; mix(p): whether to average here. Stops before a vector that ends it."""
    matrix = model.get_input_embeddings()
    table, scale = matrix.weight.detach()[:vocab], getattr(matrix, "embed_scale", 1.0)
    out = dict(own=[], sent=[], argmax=[], nearest=[], mixed=[])
    unit = torch.nn.functional.normalize
    for _ in range(steps):
        with torch.no_grad():
            logits = model(inputs_embeds=scale * inputs[None]).logits[0, -1, :vocab]
        plain, best = torch.softmax(logits, -1), int(logits.argmax())
        mixed = temperature > 0 and (mix is None or bool(mix(plain)))
        if mixed:
            tempered = logits[None] / temperature
            for processor in keep:
                tempered = processor(None, tempered)
            p = torch.softmax(tempered[0], -1)
        else:
            p = torch.nn.functional.one_hot(torch.tensor(best), len(table)).float()
        e = p @ table
        near = int(torch.cdist(unit(e, dim=-1)[None], unit(table, dim=-1)).argmin())
        if {"argmax": best, "nearest": near, "none": None}[stop] in stops:
            break
        for name, value in dict(
            own=e, sent=[p @ t[:vocab] for t in tables], argmax=best, nearest=near, mixed=mixed
        ).items():
            out[name].append(value)
        inputs = torch.cat([inputs, e[None]])
    return out


speak = jax.jit(cipher, static_argnames="max_new_tokens")
look = jax.jit(prefill)
RAGGED = [ids(q) for q in ("who is", "where is bob at the paris . who is ?", "alice says : ?")]


def heard(speaker: Speaker):
    return look(speaker.agent.params, left_pad(RAGGED, 12))


STOPS = {WORDS.index("rome") + 2, WORDS.index(".") + 2}


def ours(speaker: Speaker, temperature, *, top_k=0, top_p=1.0, stop="none", **how):
    sampling = Sampling(np.full(len(RAGGED), temperature, np.float32), top_k, top_p)
    tables = how.pop("tables", ())
    mixing = Mixing(sampling, stop=stop, **how)
    ends = dict(max_new_tokens=8, stop_tokens=np.asarray(sorted(STOPS), np.int32))
    return jax.device_get(speak(speaker.agent.params, *heard(speaker), mixing, tables=tables, **ends))


def theirs(speaker: Speaker, temperature, **how):
    temperatures = np.broadcast_to(temperature, len(RAGGED))
    rows = zip(RAGGED, temperatures, strict=True)
    return [torch_cipher(speaker.torch, speaker.table[row], 8, float(t), **how) for row, t in rows]


def assert_vectors(got, want, what: str) -> None:
    for i, row in enumerate(want):
        n = len(row["own"])
        assert got.lengths[i] == n, f"{what}: {got.lengths[i]} vectors in row {i} instead of {n}"
        assert got.tokens[i].tolist() == row["nearest"] + [-1] * (8 - n), f"{what}, row {i}"
        for vectors, expected in zip((got.own, *got.sent), (row["own"], *zip(*row["sent"], strict=True)), strict=n > 0):
            assert (vectors[i, n:] == 0).all()
            if n:
                assert_close(vectors[i, :n], torch.stack(list(expected)), f"{what}, row {i}")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_expected_embeddings_equal_a_plain_pytorch_rendering(trio, name):
    """Every row at every temperature. gemma2 scales its embeddings: rows are averaged raw, and the mean is scaled as a
    row would be, once."""
    for t in ([0.0, 0.3, 1.5], [0.3, 1.5, 0.0], [1.5, 0.0, 0.3]):
        assert_vectors(ours(trio[name], t), theirs(trio[name], t), f"{name} at {t}")


def test_a_response_ends_before_the_vector_its_stop_rule_names(trio):
    s, lengths = trio["llama"], []
    for rule in ("argmax", "nearest", "none"):
        want = theirs(s, 1.5, stop=rule, stops=STOPS)
        assert_vectors(ours(s, 1.5, stop=rule), want, rule)
        lengths.append(tuple(len(row["own"]) for row in want))
    assert len(set(lengths)) == 3 and len(set(lengths[0])) > 1 and len(set(lengths[1])) > 1, (
        "every rule has its own ends"
    )


def test_partial_cipher_averages_only_where_the_model_is_unsure_or_reversed_where_it_is_sure(trio):
    s, entropy = trio["llama"], lambda p: torch.distributions.Categorical(probs=p).entropy()
    cases = [
        (dict(partial="entropy"), lambda p: entropy(p) > 1.869),
        (dict(partial="entropy", reverse=True), lambda p: entropy(p) <= 1.869),
        (dict(partial="maxprob", threshold=0.65), lambda p: p.max() < 0.35),
    ]
    for how, rule in cases:
        want = theirs(s, 0.7, mix=rule)
        assert {m for row in want for m in row["mixed"]} == {True, False}, "both happen"
        assert_vectors(ours(s, 0.7, **how), want, str(how))
    assert THRESHOLDS["maxprob"] == pytest.approx(1 - 0.8)


def test_cuts_apply_to_the_distribution_before_it_is_averaged(trio):
    top_k, top_p = transformers.TopKLogitsWarper, transformers.TopPLogitsWarper
    for cut, keep in ((dict(top_k=3), [top_k(3)]), (dict(top_p=0.6), [top_p(0.6)]), (dict(top_k=5, top_p=0.8), [top_k(5), top_p(0.8)])):  # fmt: skip
        assert_vectors(ours(trio["llama"], 1.5, **cut), theirs(trio["llama"], 1.5, keep=keep), str(cut))


def test_receivers_get_the_same_distributions_through_their_own_tables(trio):
    """Over the vocabulary that all have, which may be smaller than a padded table."""
    s, receivers = trio["llama"], [trio["gemma2"], trio["qwen2"]]
    want = theirs(s, 1.5, tables=[r.table for r in receivers], vocab=15)
    tables = tuple(np.asarray(r.agent.params.embed) for r in receivers)
    assert_vectors(ours(s, 1.5, vocab=15, tables=tables), want, "tables")


# --- Debates: what is read, rendered by hand ---

SIMPLE = Form(
    start="who : {prompt}",
    peer="bob says : {answer} . ",
    own="alice says : {answer} . ",
    update="{others}{prompt} assistant :",
)
HISTORY = Form(peer="bob says : {answer} . ", update="{others} where ?", alone="is the ?", turns=True)


def simple(prompt, rounds, me, agents):
    """Pieces an agent reads after `rounds` rounds: text, or (round, agent) for what it said then."""
    if not rounds:
        return [f"who : {prompt}"]
    peers = [x for a in range(agents) if a != me for x in ("bob says :", (rounds - 1, a), ".")]
    return [*peers, "alice says :", (rounds - 1, me), f". {prompt} assistant :"]


def history(prompt, rounds, me, agents, chat=False):
    user, assistant = ("user :", "assistant :") if chat else ("", "")
    pieces = [f"{user} {prompt}"]
    for r in range(rounds):
        peers = [x for a in range(agents) if a != me for x in ("bob says :", (r, a), ".")]
        ask = "where ?" if peers else "is the ?"
        pieces += [assistant, (r, me), user, *peers, ask]
    return [*pieces, assistant]


def simple_chat(prompt, rounds, me, agents):
    return ["user :", *simple(prompt, rounds, me, agents), "assistant :"]


LAYOUTS = {
    "simple": (SIMPLE, False, simple),
    "simple, chat": (SIMPLE, True, simple_chat),
    "history": (HISTORY, False, history),
    "history, chat": (HISTORY, True, lambda *a: history(*a, chat=True)),
}


def torch_debate(speakers, prompts, rounds, layout, words=None):
    """What every agent says in every round to one question: [round][agent]."""
    said, n, words = [], len(speakers), words or [WORDS] * len(speakers)
    for r in range(rounds):
        read = [layout(prompts[a], r, a, n) for a in range(n)]
        texts = [" ".join(x if isinstance(x, str) else said[x[0]][x[1]] for x in pieces) for pieces in read]
        rows = zip(speakers, texts, words, strict=True)
        said.append([spell(greedy(s.torch, ids(text, w), N), w) for s, text, w in rows])
    return said


def torch_cipher_debate(speakers, temperatures, prompts, rounds, layout):
    """Likewise in expected embeddings: [round][agent] of nearest tokens, and what was spliced together by hand."""
    tables, said = [s.table for s in speakers], []
    for r in range(rounds):
        now = []
        for a, (s, t) in enumerate(zip(speakers, temperatures, strict=True)):
            inputs = [s.table[[BOS]]]
            for x in layout(prompts[a], r, a, len(speakers)):
                if isinstance(x, str):
                    inputs.append(s.table[ids(x)[1:]])
                elif said[x[0]][x[1]]["own"]:
                    inputs.append(torch.stack([sent[a] for sent in said[x[0]][x[1]]["sent"]]))
            now.append(torch_cipher(s.torch, torch.cat(inputs), N, t, tables=tables, stop="argmax", stops={EOS}))
        said.append(now)
    return [[out["nearest"] for out in now] for now in said]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cipher_debate_splices_vectors_where_its_form_puts_answers(trio, name):
    """Two widths, unequal prompts, three rounds; the answer is that of the agent with the lowest temperature."""
    form, chat, layout = LAYOUTS[name]
    speakers, temperatures = [trio["llama"], trio["gemma2"]], [0.9, 0.4]
    agents = [(s.chatty if chat else s).agent for s in speakers]
    turn = cipher_debate(
        agents, (QUESTIONS, OTHERS), temperatures=temperatures, rounds=3, form=form, max_message_tokens=N
    )
    replies, lengths = turn.write(N), []
    for i, (question, other) in enumerate(zip(QUESTIONS, OTHERS, strict=True)):
        want = torch_cipher_debate(speakers, temperatures, (question, other), 3, layout)
        assert replies[i].details["rounds"] == [[spell(tokens) for tokens in now] for now in want[:2]]
        assert replies[i].details["agent"] == 1
        assert replies[i].written == tuple(agents[1].tokens(want[2][1]))
        assert replies[i].text == spell(want[2][1])
        lengths += [len(tokens) for now in want for tokens in now]
    assert len(set(lengths)) > 1, "some responses end before the others"


TWO, THREE = ("llama", "gemma2"), ("gemma2", "llama", "gemma2")


@pytest.mark.parametrize(
    "name, families", [*((name, TWO) for name in LAYOUTS), ("simple", THREE), ("history, chat", THREE)]
)
def test_a_text_debate_is_read_as_its_form_lays_it_out(trio, name, families):
    """Every text of every round, from strings built by hand and written by transformers: synchronous, others first, own
    last; with turns=True everything said before stays."""
    form, chat, layout = LAYOUTS[name]
    speakers = [trio[f] for f in families]
    agents, prompts = (
        [(s.chatty if chat else s).agent for s in speakers],
        [QUESTIONS, OTHERS, QUESTIONS][: len(speakers)],
    )
    texts = set()
    for rounds in (1, 3) if len(families) == 2 else (2,):
        replies = debate(agents, prompts, rounds=rounds, form=form, max_message_tokens=N).write(N)
        for i, reply in enumerate(replies):
            want = torch_debate(speakers, [own[i] for own in prompts], rounds, layout)
            assert [*reply.details["rounds"], reply.details["texts"]] == want
            texts |= {text for now in want for text in now}
    assert len(texts) > 4, "they do not say one thing"


# --- Debates: limits and votes ---


@pytest.mark.parametrize(
    "name, families",
    [*((name, TWO) for name in LAYOUTS), ("simple", THREE)],
)
def test_a_cipher_debate_at_temperature_0_is_the_text_debate(trio, name, families):
    form, chat, _ = LAYOUTS[name]
    agents = [(trio[f].chatty if chat else trio[f]).agent for f in families]
    prompts = [QUESTIONS, OTHERS, QUESTIONS[::-1]][: len(agents)]
    how = dict(rounds=3, form=form, max_message_tokens=N)
    want = debate(agents, prompts, **how).write(N)
    for temperature in (0.0, 1e-4):
        replies = cipher_debate(agents, prompts, temperatures=[temperature] * len(agents), **how).write(N)
        for got, text in zip(replies, want, strict=True):
            assert got.details["rounds"] == text.details["rounds"]
            assert got.text == text.details["texts"][got.details["agent"]]
    assert len({len(t.split()) for reply in want for now in reply.details["rounds"] for t in now}) > 1


def test_a_cipher_debate_at_temperature_0_is_the_text_debate_on_real_text(trained):
    """Of a trained model with a byte-level tokenizer; the first agent has to hear the answer from the second."""
    b = trained.agent
    prompts = [g.prompt_b for g in GAMES], [f"{g.prompt_a} {g.prompt_b}" for g in GAMES]
    how = dict(rounds=2, form="plain", max_message_tokens=N)
    want = debate((b, b), prompts, **how).write(N)
    for temperature in (0.0, 1e-3):
        replies = cipher_debate((b, b), prompts, temperatures=[temperature] * 2, **how).write(N)
        for got, text in zip(replies, want, strict=True):
            assert got.details["rounds"] == text.details["rounds"] and got.text == text.details["texts"][0]
    assert len({text for reply in want for text in reply.details["rounds"][0]}) > 2


def test_who_says_nothing_leaves_the_words_around_its_answer_whole(trio):
    """Where text would be cut into tokens across the place of an empty answer."""
    one, other = trio["llama"].agent, trio["qwen2"].agent
    silence = other.params.replace(head=jnp.zeros_like(other.params.head))  # <s> is as likely as any, and the first
    mute = dataclasses.replace(other, params=silence, stop_tokens=(BOS,))
    how = dict(rounds=2, form=Form(peer=":{answer}: who ", update="{others}{prompt}"), max_message_tokens=N)
    want = debate((one, mute), (QUESTIONS, QUESTIONS), **how)
    got = cipher_debate((one, mute), (QUESTIONS, QUESTIONS), temperatures=(0.0, 1.0), **how)
    for text, reply, cipher_reply in zip(want.turns[0].write(N), want.write(N), got.write(N), strict=True):
        assert reply.details["rounds"][0][1] == "" and "::" in text.read
        assert cipher_reply.read == text.read and cipher_reply.text == text.text


def test_one_agent_alone_reflects(trio):
    """It reads its own answer and the form's words for that; with turns, all of its answers."""
    s = trio["llama"]
    for rounds in (2, 3):
        reply = debate([s.agent], [QUESTIONS], rounds=rounds, form=HISTORY, max_message_tokens=N).write(N)
        for i, question in enumerate(QUESTIONS):
            assert [*reply[i].details["rounds"], [reply[i].text]] == torch_debate([s], [question], rounds, history)


def test_agents_with_different_vocabularies_debate_in_text_but_not_in_embeddings(trio):
    speakers = [trio["llama"], trio["reversed"]]
    agents, prompts = [s.agent for s in speakers], (QUESTIONS, OTHERS)
    replies = debate(agents, prompts, rounds=2, form=SIMPLE, max_message_tokens=N).write(N)
    for i, reply in enumerate(replies):
        want = torch_debate(speakers, [own[i] for own in prompts], 2, simple, [WORDS, [*WORDS[::-1], "extra"]])
        assert [*reply.details["rounds"], reply.details["texts"]] == want
    with pytest.raises(ValueError, match=r"llama \(18 tokens\) and qwen2 \(19\) differ, as in '[^']+': use debate"):
        cipher_debate(agents, prompts, temperatures=(0.0, 1.0), form=SIMPLE)


def test_the_harness_form_lays_out_solutions_as_it_says(trained):
    """On real text, through transformers' own tokenizer, model and generate; one agent lacks what the other knows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("b"))

    def say(text):
        out = greedy(trained.torch, tokenizer(text)["input_ids"], N)
        return tokenizer.decode(out, skip_special_tokens=True).strip()

    prompts = [g.prompt_b for g in GAMES], [f"{g.prompt_a} {g.prompt_b}" for g in GAMES]
    replies = debate([trained.agent] * 2, prompts, rounds=2, max_message_tokens=N).write(N)
    for *asked, reply in zip(*prompts, replies, strict=True):
        first = [say(text) for text in asked]
        assert first[0] != first[1] and reply.details["rounds"] == [first]
        for me, text in enumerate(asked):
            assert reply.details["texts"][me] == say(
                "These are the solutions to the problem from other agents:\n\n"
                f"One agent solution: ```{first[1 - me]}```\n\nYour own solution: ```{first[me]}```\n\n"
                f"Use these solutions as additional information and answer again.\n\n{text}"
            )


def test_du_et_als_forms_are_conversations_that_keep_their_key_phrases():
    """Structure and phrases of the specification: roles alternate, peers in back-ticks, the agent's own answer only as its turn."""
    phrases = {
        "numeric": ("Explain your reasoning.", "The original math problem is: ", "\\boxed{answer}", "double check"),
        "choice": ("as accurately as possible", "give an updated answer? Examine your solution and that of the other agents step by step.", "(X)", "double check"),
        "biography": ("bullet point biography of ", "Closely examine your biography and those of the other agents", "with each fact separated with a new line character", "examine your biography"),
    }  # fmt: skip
    for name, (start, update, both, alone) in phrases.items():
        form = FORMS[name]
        first = form.begin("who is alice ?")
        assert start in first and "who is alice ?" in first and both in first
        middle = form.next_prompt("who is alice ?", first, "own words", ["one", "two"], False)
        last = form.next_prompt("who is alice ?", middle, "changed", ["three", "four"], True)
        assert [turn["role"] for turn in last] == ["user", "assistant", "user", "assistant", "user"]
        assert [turn["content"] for turn in last[:2]] == [first, "own words"] and last[3]["content"] == "changed"
        assert all(f"```{x}```" in last[2]["content"] for x in ("one", "two")) and "own words" not in last[2]["content"]
        assert all(f"```{x}```" in last[4]["content"] for x in ("three", "four")) and "```one" not in last[4]["content"]
        assert update in last[4]["content"] and "{" not in last[4]["content"].replace("{answer}", "")
        reflect = form.next_prompt("who is alice ?", first, "own words", [], True)[-1]["content"]
        assert alone in reflect and "other agents" not in reflect


@pytest.mark.parametrize("tie", ["first", "last"])
def test_the_majority_answers_and_ties_go_to_the_first_or_the_last(trio, tie):
    texts = lambda panel: [r.details["texts"] for r in panel.write(N, until=["alice ?"])]
    a, b = trio["llama"].agent, trio["gemma2"].agent
    for agents, elected in (((a, b), (0, 1)), ((a, b, b), (1, 2)), ((b, a, b), (0, 2)), ((a,), (0, 0))):
        panel = debate(agents, [QUESTIONS] * len(agents), rounds=1, tie=tie)
        winner = elected[tie == "last"]
        for reply in panel.write(N):
            assert reply.details["agent"] == winner and reply.text == reply.details["texts"][winner]
            assert len(agents) < 2 or len(set(reply.details["texts"])) == 2
    assert texts(panel)


def test_scores_are_torchs_log_likelihoods_and_greedy_is_what_greedy_decoding_writes(trio):
    """Of unequal numbers of texts of unequal lengths, one of them what the agent would write."""
    s, found = trio["gemma2"], []
    own = [greedy(s.torch, ids(q), N) for q in QUESTIONS]
    texts = [
        [*given, " " + spell(tokens)] if EOS not in tokens else given for given, tokens in zip(TEXTS, own, strict=True)
    ]
    for i, got in enumerate(start_turn(s.agent, QUESTIONS).score(texts)):
        want = [log_likelihood(s, ids(QUESTIONS[i]), ids(text)[1:]) for text in texts[i]]
        assert_scored(got, want, [len(text.split()) for text in texts[i]])
        found += got.greedy
    assert set(found) == {True, False}


def test_a_panels_score_is_the_mean_over_its_agents_and_greedy_by_majority(trio):
    speakers, prompts, found = [trio["gemma2"], trio["llama"], trio["gemma2"]], [QUESTIONS, OTHERS, QUESTIONS], []
    first = lambda s, q: " " + spell(greedy(s.torch, ids(q), 1))
    texts = [
        [first(speakers[0], q), *given, first(speakers[1], other)]
        for given, q, other in zip(TEXTS, QUESTIONS, OTHERS, strict=True)
    ]
    for i, got in enumerate(debate([s.agent for s in speakers], prompts, rounds=1).score(texts)):
        pairs = list(zip(speakers, prompts, strict=True))
        every = [[log_likelihood(s, ids(own[i]), ids(text)[1:]) for s, own in pairs] for text in texts[i]]
        want = [(np.mean([x for x, _ in each]), sum(g for _, g in each) >= 2) for each in every]
        assert_scored(got, want, [len(text.split()) for text in texts[i]])
        found += [sum(g for _, g in each) for each in every]
    assert {1, 2} <= set(found), f"some texts are greedy for one, some for two: {found}"
