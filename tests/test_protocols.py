"""Protocols against renderings in plain PyTorch and transformers: what agents read, write and score, in text, in expected
embeddings and in activations. The oracles keep no cache, pad nothing and take one question at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxcomm.agent import Agent
from jaxcomm.cipher import THRESHOLDS, cipher
from jaxcomm.communicate import communicate, communicate_logits
from jaxcomm.converters import agent_from_hf, from_hf
from jaxcomm.evals.games import countries
from jaxcomm.evals.pair import folder
from jaxcomm.generate import Sampling, left_pad
from jaxcomm.model import prefill
from jaxcomm.protocols import FORMS, Form, activation, cipher_debate, debate, exchange
from jaxcomm.protocols.answers import choice, correct, numeric, vote, whole
from jaxcomm.protocols.base import hear

import conftest
from conftest import assert_close, make_checkpoint, toy_tokenizer

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread makes torch thirty times slower on models this small, where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


N = 6
"""Tokens or vectors in a message, and in an answer."""
BOS, EOS = 0, 1
WORDS = [*conftest.WORDS, "::"]
QUESTIONS = ["who is alice ?", "where is bob at the paris . who is ?", "alice says : bob is at rome ."]
OTHERS = ["where is rome ?", "who ?", "is bob at the rome ? paris ."]


@dataclasses.dataclass(frozen=True)
class Speaker:
    """The same model twice, transformers' and ours, with its tokenizer."""

    torch: transformers.PreTrainedModel
    agent: Agent

    @property
    def chatty(self) -> "Speaker":
        return dataclasses.replace(self, agent=dataclasses.replace(self.agent, chat=True))

    @property
    def table(self) -> torch.Tensor:
        return self.torch.get_input_embeddings().weight.detach()


def speaker(where, family: str, seed: int, words=WORDS) -> Speaker:
    """Random, and lively: a fresh model says one word for ever, so blocks weigh more here, and logits differ more."""
    tokenizer = toy_tokenizer(words)
    changes = dict(final_logit_softcapping=15.0) if family == "gemma2" else {}
    model = make_checkpoint(
        where, family, seed, vocab_size=len(tokenizer), eos_token_id=EOS, num_hidden_layers=2, **changes
    ).torch
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(3)
            if family == "gemma2" and name.endswith(("attention_layernorm.weight", "feedforward_layernorm.weight")):
                weight.add_(2 if ".post_" in name else 0)
            if name == "model.norm.weight":
                weight.mul_(2).add_(2 if family == "gemma2" else 0)
        model.get_output_embeddings().weight[BOS] *= 0.05  # nobody says <s>, which text would lose
    model.save_pretrained(where)
    return Speaker(model, Agent(from_hf(where), tokenizer, (EOS,), name=family))


@pytest.fixture(scope="session")
def trio(tmp_path_factory) -> dict[str, Speaker]:
    """Three families, three widths, one vocabulary; "reversed" has another tokenizer."""
    make = lambda name, *how: speaker(tmp_path_factory.mktemp(name), *how)
    return {
        "llama": make("llama", "llama", 23),
        "qwen2": make("qwen2", "qwen2", 22),
        "gemma2": make("gemma2", "gemma2", 32),
        "reversed": make("reversed", "qwen2", 27, [*WORDS[::-1], "extra"]),
    }


@pytest.fixture(scope="session")
def trained() -> Speaker:
    """A model of the embedded pair: real text, a byte-level tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("b"), dtype=torch.float32)
    return Speaker(model.eval(), agent_from_hf(folder("b"), name="b", unroll=False))


def ids(text: str, words=WORDS) -> list[int]:
    """The toy tokenizer: <s>, then a number per word."""
    return [BOS, *(2 + words.index(w) if w in words else BOS for w in text.split())]


def spell(tokens, words=WORDS) -> str:
    return " ".join(words[int(t) - 2] for t in tokens if t > EOS)


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


speak = jax.jit(cipher, static_argnames=("vocab", "max_new_tokens", "stop", "partial", "reverse"))
look = jax.jit(prefill)
RAGGED = [ids(q) for q in ("who is", "where is bob at the paris . who is ?", "alice says : ?")]


def heard(speaker: Speaker):
    tokens, mask = left_pad(RAGGED, 12)
    return look(speaker.agent.params, tokens, mask=mask)


STOPS = {WORDS.index("rome") + 2, WORDS.index(".") + 2}


def ours(speaker: Speaker, temperature, *, top_k=0, top_p=1.0, stop="none", **how):
    sampling = Sampling(np.full(len(RAGGED), temperature, np.float32), top_k, top_p)
    how = how | dict(max_new_tokens=8, stop=stop, stop_tokens=np.asarray(sorted(STOPS), np.int32))
    return jax.device_get(speak(speaker.agent.params, *heard(speaker), sampling=sampling, **how))


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


def greedy(model, tokens, steps):
    """transformers' own greedy text, its stop token included."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), do_sample=False, max_new_tokens=steps,
            eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
    return out[0, len(tokens) :].tolist()


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


GAMES = countries(0, 3)


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
        middle = form.go_on("who is alice ?", first, "own words", ["one", "two"], False)
        last = form.go_on("who is alice ?", middle, "changed", ["three", "four"], True)
        assert [turn["role"] for turn in last] == ["user", "assistant", "user", "assistant", "user"]
        assert [turn["content"] for turn in last[:2]] == [first, "own words"] and last[3]["content"] == "changed"
        assert all(f"```{x}```" in last[2]["content"] for x in ("one", "two")) and "own words" not in last[2]["content"]
        assert all(f"```{x}```" in last[4]["content"] for x in ("three", "four")) and "```one" not in last[4]["content"]
        assert update in last[4]["content"] and "{" not in last[4]["content"].replace("{answer}", "")
        reflect = form.go_on("who is alice ?", first, "own words", [], True)[-1]["content"]
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


def log_likelihood(speaker: Speaker, before, after) -> tuple[float, bool]:
    with torch.no_grad():
        logits = speaker.torch(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].double()
    picked = torch.log_softmax(logits, -1)[torch.arange(len(after)), torch.tensor(after)]
    return float(picked.sum()), logits.argmax(-1).tolist() == list(after)


def assert_scored(got, want, tokens) -> None:
    assert got.logprobs == pytest.approx([x for x, _ in want], abs=1e-4)
    assert got.greedy == tuple(g for _, g in want) and got.tokens == tuple(tokens)


TEXTS = [[" alice", " bob is at rome .", " the"], [" paris"], [" who is bob ? who is bob ?", " ."]]


def test_scores_are_torchs_log_likelihoods_and_greedy_is_what_greedy_decoding_writes(trio):
    """Of unequal numbers of texts of unequal lengths, one of them what the agent would write."""
    s, found = trio["gemma2"], []
    own = [greedy(s.torch, ids(q), N) for q in QUESTIONS]
    texts = [
        [*given, " " + spell(tokens)] if EOS not in tokens else given for given, tokens in zip(TEXTS, own, strict=True)
    ]
    for i, got in enumerate(hear(s.agent, QUESTIONS).score(texts)):
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


# --- A turn ---

LONG = 40


@pytest.fixture(scope="module")
def spoken(trio):
    """A turn, what it writes if nothing stops it, and torch's log-probability of each of these tokens."""
    s = trio["gemma2"]
    turn = hear(s.agent, QUESTIONS)
    how = dict(sampling=Sampling(2.5), seed=1)
    replies = turn.write(LONG, **how)
    vocabulary = ["<s>", "</s>", *WORDS]
    tokens = [[vocabulary.index(w) for w in r.written] for r in replies]
    logprobs = [
        [log_likelihood(s, [*ids(q), *row[:n]], row[n : n + 1])[0] for n in range(len(row))]
        for q, row in zip(QUESTIONS, tokens, strict=True)
    ]
    assert max(map(len, tokens)) > 20, "it goes on for more than a step"
    return turn, how, tokens, logprobs


@given(st.data())
def test_writing_until_a_stop_string_is_writing_everything_and_cutting_there(spoken, data):
    turn, how, tokens, logprobs = spoken
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        text = spell(data.draw(st.sampled_from(tokens)))
        assume(text)
        begin = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[begin : begin + data.draw(st.integers(1, 12))])
    for row, probs, reply in zip(tokens, logprobs, turn.write(LONG, until=stops, **how), strict=True):
        hit = lambda n, row=row: min((at for s in stops if (at := spell(row[:n]).find(s)) >= 0), default=None)
        n = next((n for n in range(len(row) + 1) if hit(n) is not None), len(row))
        assert reply.raw == spell(row[:n])[: hit(n)]
        assert reply.written == tuple(turn.agent.tokens(row[:n]))
        assert reply.logprob == pytest.approx(sum(probs[:n]), abs=1e-4)


def test_a_turn_may_write_and_score_again_and_again(trio):
    turn = hear(trio["gemma2"].agent, QUESTIONS)
    once, scores = turn.write(1), turn.score(TEXTS)
    longer = turn.write(N)
    assert turn.write(1) == once and turn.write(N) == longer and turn.score(TEXTS) == scores


def test_a_rows_sampled_text_follows_its_seed_whoever_its_neighbours_are(trio):
    agent, how = trio["gemma2"].agent, dict(sampling=Sampling(2.0))
    said = lambda prompts, seeds: [r.text for r in hear(agent, prompts).write(LONG, seed=seeds, **how)]
    together = said(QUESTIONS, [5, 9, 2])
    order = [2, 0, 1]
    assert said([QUESTIONS[i] for i in order], [[5, 9, 2][i] for i in order]) == [together[i] for i in order]
    assert said([QUESTIONS[0], *OTHERS[:2]], [5, 1, 1])[0] == together[0]
    again = said([QUESTIONS[0]] * 3, [5, 6, 5])
    assert again[0] == again[2] == together[0] != again[1]


def test_space_at_a_prompts_end_is_read_once(trained):
    """What is scored after a prompt that ends in a line feed, raw or by its chat template, are the tokens that follow it."""
    s = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("b"))
    tokenizer.chat_template = "{{ messages[0].content + ' Answer:\\n' }}"
    chatty = dataclasses.replace(s.agent, chat=True, tokenizer=tokenizer)
    text = f"{GAMES[0].prompt_a} {GAMES[0].prompt_b} Answer:\n"
    for agent, prompt, special in ((s.agent, text, True), (chatty, text[: -len(" Answer:\n")], False)):
        row = tokenizer.encode(text, add_special_tokens=special)
        after = tokenizer.encode(text + "Greece.", add_special_tokens=special)
        assert after[: len(row)] == row
        (got,) = hear(agent, [prompt]).score([["Greece."]])
        assert_scored(got, [log_likelihood(s, row, after[len(row) :])], [len(after) - len(row)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, b: debate((a, b), (["who ?"], [" "])), "empty prompt at row 0"),
        (lambda a, b: debate((a,), (["who ? " * 600],)), "a prompt of 1201 tokens does not fit"),
        (lambda a, b: hear(a, ["who ? " * 500]).write(30), "leave room for 994; shorten it"),
        (lambda a, b: hear(a, ["who ? " * 511]).score([["who " * 5]]), "leave room for 1020; shorten it"),
        (lambda a, b: hear(a, ["who ?"]).score([[""]]), "a text to score has no tokens"),
        (lambda a, b: debate((a, b), (["who ?"],) * 2, form="odd"), "unknown form 'odd': choose one of harness, plain"),
        (lambda a, b: debate((a, b), (["who ?"],) * 2, answer="odd"), "unknown answer 'odd': choose one of numeric"),
        (lambda a, b: cipher_debate((a,), (["who ?"],), temperatures=[0.0], form="odd"), "unknown form 'odd'"),
        (lambda a, b: exchange(a, b, ["who ?"], ["who ?"], k=1, j=1, answer="odd"), "unknown answer 'odd'"),
        (lambda a, b: debate((a, b), (["who ?"],)), "2 agents and prompts for [1]"),
        (lambda a, b: debate((a, b), (["who ?"], ["who ?", "is"])), "2 agents and prompts for [1, 2]"),
        (lambda a, b: debate((), ()), "0 agents"),
        (lambda a, b: debate((a,), (["who ?"],), rounds=0), "rounds = 0: a debate has at least 1"),
        (lambda a, b: cipher_debate((a, b), (["who ?"],) * 2, temperatures=[0.5]), "temperatures [0.5] for 2 agents"),
        (
            lambda a, b: cipher_debate((a, b), (["who ?"],) * 2, temperatures=[0.5, -1.0]),
            "temperatures [0.5, -1.0] for 2",
        ),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=1, j=1), "give one of each"),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=(1,), j=1), "give one of each"),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=(1, 1), j=1), "give every sender a W"),
    ],
)
def test_bad_input_is_one_clear_line(trio, call, message):
    with pytest.raises(ValueError) as error:
        call(trio["llama"].agent, trio["gemma2"].agent)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- Activations, beyond one sender and one edit ---


def torch_state(speaker: Speaker, tokens, k):
    """h[k] at the last token; transformers' hidden state of the last layer is normed, so a hook reads it."""
    box = []
    hook = speaker.torch.model.layers[k - 1].register_forward_hook(
        lambda module, inputs, out: box.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        speaker.torch(torch.tensor([tokens]))
    hook.remove()
    return box[0][0, -1]


def torch_receive(speaker: Speaker, tokens, message, j, steps=N):
    """Greedy text after a prompt whose last token's h[j] is replaced in every pass."""

    def edit(module, inputs, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        d = min(len(message), h.shape[-1])
        h[0, len(tokens) - 1, -d:] = message[-d:]
        return (h, *out[1:]) if isinstance(out, tuple) else h

    hook, text = speaker.torch.model.layers[j - 1].register_forward_hook(edit), []
    with torch.no_grad():
        while len(text) < steps and EOS not in text:
            text.append(int(speaker.torch(torch.tensor([[*tokens, *text]])).logits[0, -1].argmax()))
    hook.remove()
    return text


def test_prompts_that_begin_alike_are_read_once_and_give_what_each_gives_alone(trio):
    """Text, scores and activation replies; one of them is all that the others begin with, and windows (9) are shorter."""
    s = trio["gemma2"]
    examples = " ".join(np.random.default_rng(0).choice(WORDS, 50))
    prompts = [examples, f"{examples} {QUESTIONS[0]}", f"{examples} {QUESTIONS[1]}"]
    turn = hear(s.agent, prompts)
    (past,) = turn.past
    assert past.positions.shape[0] == 1 and past.positions.max() == 49, "all but the shortest one's last token"
    sent = activation(s.agent, s.agent, prompts, prompts[::-1], k=1, j=2).write(N)
    replies, scores = turn.write(N), turn.score([TEXTS[0]] * 3)
    assert turn.write(N, until=["nobody says this"]) == replies
    for i, row in enumerate(map(ids, prompts)):
        alone = greedy(s.torch, row, N)
        assert replies[i].written == tuple(s.agent.tokens(alone)) and replies[i].read == tuple(s.agent.tokens(row))
        assert replies[i].logprob == pytest.approx(log_likelihood(s, row, alone)[0], abs=1e-4)
        want = [log_likelihood(s, row, ids(text)[1:]) for text in TEXTS[0]]
        assert_scored(scores[i], want, [len(text.split()) for text in TEXTS[0]])
        to = ids(prompts[::-1][i])
        assert sent[i].written == tuple(s.agent.tokens(torch_receive(s, to, torch_state(s, row, 1), 2)))
        assert (sent[i].details["sent_position"], sent[i].details["edited_position"]) == (len(row) - 1, len(to) - 1)


def test_of_several_senders_the_mean_of_what_they_send_arrives(trio):
    senders, b = [trio["llama"], trio["gemma2"]], trio["gemma2"]
    reads, ks = (OTHERS, QUESTIONS[::-1]), (2, 1)
    rng = np.random.default_rng(0)
    Ws = [rng.normal(size=(40, len(s.table[0]))).astype(np.float32) / 4 for s in senders]
    replies = activation([s.agent for s in senders], b.agent, reads, QUESTIONS, k=ks, j=1, W=Ws).write(N)
    for i, reply in enumerate(replies):
        states = [torch_state(s, ids(own[i]), k) for s, own, k in zip(senders, reads, ks, strict=True)]
        mean = sum(torch.from_numpy(W) @ h for W, h in zip(Ws, states, strict=True)) / 2
        assert reply.written == tuple(b.agent.tokens(torch_receive(b, ids(QUESTIONS[i]), mean, 1)))
        assert reply.details["norm_sent"] == pytest.approx(float(mean.norm()), rel=1e-4)
    same = activation([b.agent, b.agent], b.agent, (OTHERS, OTHERS), QUESTIONS, k=(2, 2), j=1).write(N)
    one = activation(b.agent, b.agent, OTHERS, QUESTIONS, k=2, j=1).write(N)
    assert [r.written for r in same] == [r.written for r in one]


def test_thinking_sends_the_state_at_the_last_token_written(trio):
    """That is: what `communicate` sends for these tokens, and what a hook on transformers sees there."""
    a, b = trio["gemma2"], trio["llama"]
    lengths = []
    for i, reply in enumerate(activation(a.agent, b.agent, QUESTIONS, OTHERS, k=1, j=2, think=N).write(N)):
        thought = greedy(a.torch, ids(QUESTIONS[i]), N)
        read = [*ids(QUESTIONS[i]), *(t for t in thought if t != EOS)]
        want = torch_receive(b, ids(OTHERS[i]), torch_state(a, read, 1), 2)
        assert reply.details["thought"] == [spell(thought)]
        assert reply.written == tuple(b.agent.tokens(want))
        assert reply.details["sent_position"] == len(read) - 1
        if i == 0:
            rows = np.asarray([read], np.int32), np.asarray([ids(OTHERS[i])], np.int32)
            said = communicate(a.agent.params, b.agent.params, *rows, k=1, j=2, max_new_tokens=N, stop_tokens=(EOS,))
            assert [t for t in said.tokens[0].tolist() if t >= 0] == want
        lengths.append(len(thought))
    assert min(lengths) < N, "one of them stops by itself"


def test_an_exchange_sends_both_states_unedited(trio):
    a, b = trio["gemma2"], trio["llama"]
    replies = exchange(a.agent, b.agent, QUESTIONS, OTHERS, k=1, j=2, k_back=2, j_back=1).write(N)
    for x, y, reply in zip(QUESTIONS, OTHERS, replies, strict=True):
        there = torch_receive(b, ids(y), torch_state(a, ids(x), 1), 2)
        back = torch_receive(a, ids(x), torch_state(b, ids(y), 2), 1)
        assert reply.details["texts"] == [spell(there), spell(back)]


@pytest.mark.parametrize("graft, where, k, j", [("mean", "last", 1, 2), ("sum", "all", 2, 1)])
def test_scores_after_an_activation_are_what_communicate_foresees(trio, graft, where, k, j):
    a = b = trio["gemma2"].agent
    how = dict(k=k, j=j, graft=graft, where=where)
    foresee = jax.jit(communicate_logits, static_argnames=("k", "j", "graft", "where"))
    scores = activation(a, b, OTHERS, QUESTIONS, **how).score([TEXTS[2]] * 3)
    (ta, ma), (tb, mb) = (left_pad([ids(q) for q in own], 32) for own in (OTHERS, QUESTIONS))
    for c, text in enumerate(TEXTS[2]):
        answer = ids(text)[1:] + [0] * (8 - len(text.split()))
        answers = np.asarray([answer] * 3, np.int32)
        logits = np.asarray(foresee(a.params, b.params, ta, tb, answers, mask_a=ma, mask_b=mb, **how))
        n = len(text.split())
        for i in range(3):
            logprobs = torch.log_softmax(torch.tensor(logits[i, :n]), -1)[torch.arange(n), answer[:n]]
            assert scores[i].logprobs[c] == pytest.approx(float(logprobs.sum()), abs=1e-4)
            assert scores[i].greedy[c] == (logits[i, :n].argmax(-1).tolist() == answer[:n])


# --- Answers ---

NUMBERS = st.decimals(-(10**9), 10**9, allow_nan=False, places=3)
PROSE = st.text(st.characters(blacklist_categories=("Nd", "Cs"), blacklist_characters="{}-$"), max_size=20)


@given(NUMBERS, PROSE, PROSE, st.booleans(), st.booleans())
def test_a_number_is_read_back_however_it_is_set(value, before, after, commas, dollar):
    digits = f"{abs(value):,f}" if commas else f"{abs(value):f}"
    written = f"{'-' if value < 0 else ''}{'$' if dollar else ''}{digits}"
    plain = f"{value.normalize():f}" if value else "0"
    assert numeric(f"{before} \\boxed{{{written}}} {after} , so 5 apples") == plain, "the last in braces"
    assert numeric(f"First 17 , then {before} {written} {after}") == plain, "or else the last of all"


@pytest.mark.parametrize(
    "text, number",
    [
        ("It costs $1,250.00.", "1250"),
        ("72.", "72"),
        ("{ 3 } and then \\boxed{ 72 }", "72"),
        ("1,000 or 007", "7"),
        ("100", "100"),
        ("{x} is 4", "4"),
        ("5-10 minutes", "10"),
        ("x-3", "3"),
        ("(3)-4", "4"),
        ("so...5", "5"),
        ("it is -4", "-4"),
        ("=-$4", "-4"),
        ("it is .5", "0.5"),
        ("-0.0", "0"),
        ("{1.2.3}", None),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_at_the_edges(text, number):
    assert numeric(text) == number


def test_a_choice_is_the_last_letter_in_brackets_or_the_last_capital_alone():
    said = {"(A) no, (c)": "C", "It is B, not D.": "D", "A (b) C": "B", "Because": None, "": None, "(AB) J": "J"}
    assert {text: choice(text) for text in said} == said
    assert [whole(t) for t in (" Paris.\nNo", "paris", " ", ".")] == ["paris", "paris", None, None]


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), min_size=1, max_size=7))
def test_a_vote_elects_who_gave_an_answer_that_no_other_outnumbers(answers):
    counts = {a: answers.count(a) for a in answers if a is not None}
    best = [i for i, a in enumerate(answers) if a is not None and counts[a] == max(counts.values())]
    best = best or list(range(len(answers)))
    assert (vote(answers), vote(answers, "last")) == (min(best), max(best))


def test_the_released_scoring_differs_only_where_it_is_asked_for():
    cases = {("no idea", "4"): (False, True), ("-4", "4"): (False, True), ("4", "-4"): (False, True)}
    cases |= {("it is 4.0", "so 4"): (True, True), ("5", "4"): (False, False), ("-4", "-4"): (True, True)}
    for (text, gold), want in cases.items():
        assert (correct(text, gold, numeric), correct(text, gold, numeric, released=True)) == want, (text, gold)
