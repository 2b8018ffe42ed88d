"""Strings in, strings out: agents, protocols, the command line, the embedded pair."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.agent import Agent
from jaxcomm.attention import BLOCKS
from jaxcomm.communication import communicate
from jaxcomm.config import ModelConfig
from jaxcomm.converters import load_agent
from jaxcomm.evals.games import countries
from jaxcomm.flops import blocks_flops, generation_flops
from jaxcomm.messages import send
from jaxcomm.model import init_params
from jaxcomm.protocols import StandIn, activation, message, silent, skyline
from jaxcomm.protocols.base import start_turn
from jaxcomm.reading import forward

from command import jaxcomm, refused
from conftest import WORDS, assert_close, make_checkpoint, toy_tokenizer


@pytest.fixture(scope="session")
def agents(tmp_path_factory):
    """Two random agents of different widths and families over one toy vocabulary, as checkpoint folders."""
    fast = toy_tokenizer()
    folders = []
    for name, family in (("a", "llama"), ("b", "gemma2")):
        folder = tmp_path_factory.mktemp(f"agent_{name}")
        make_checkpoint(folder, family, seed=7, vocab_size=len(fast), eos_token_id=1)
        fast.save_pretrained(folder)
        folders.append(folder)
    return tuple(load_agent(folder, name=name, unroll=False) for folder, name in zip(folders, "ab", strict=True))


A_READS, B_READS = ["alice is at rome .", "bob is at the paris ."], ["where is alice ?", "where is bob ?"]


def test_the_text_level_twin_says_what_communicate_says(agents):
    a, b = agents
    for k, j, graft in ((1, 2, "replace"), (4, 0, "sum")):
        replies = activation(a, b, A_READS, B_READS, k=k, j=j, graft=graft).write(6)
        for x, y, reply in zip(A_READS, B_READS, replies, strict=True):
            ta, tb = np.asarray([a.encode(x)], np.int32), np.asarray([b.encode(y)], np.int32)
            out = communicate(
                a.params, b.params, ta, tb, k=k, j=j, graft=graft, max_new_tokens=6, stop_tokens=b.stop_tokens
            )
            assert reply.text == b.text(out)[0]
            assert reply.written == tuple(b.tokens(np.asarray(out.tokens)[0, : int(out.lengths[0])]))
            assert reply.read == ("<s>", *y.split())


def test_rows_say_what_was_read_and_edited(agents):
    a, b = agents
    (reply, _) = activation(a, b, A_READS, B_READS, k=2, j=3, graft="mean").write(2)
    d = reply.details
    sent = send(a.params, np.asarray([a.encode(A_READS[0])], np.int32), 2).states[0]
    own = send(b.params, np.asarray([b.encode(B_READS[0])], np.int32), 3).states[0]
    width = b.params.config.width
    assert (d["sent_token"], d["sent_position"], d["edited_token"], d["edited_position"]) == (".", 5, "?", 4)
    assert_close(d["norm_sent"], jnp.linalg.norm(sent), "sent", 1e-4)
    assert_close(d["norm_before"], jnp.linalg.norm(own), "before", 1e-4)
    assert_close(d["norm_after"], jnp.linalg.norm((sent[-width:] + own) / 2), "after", 1e-4)


def test_controls_are_what_they_are_called(agents):
    a, b = agents
    said = lambda **s: [r.text for r in activation(a, b, A_READS, B_READS, j=2, **s).write(6)]
    assert said(k=3, control="other") == [
        activation(a, b, [x], [y], k=3, j=2).write(6)[0].text for x, y in zip(A_READS[::-1], B_READS, strict=True)
    ]
    alone = [r.text for r in silent(a, b, A_READS, B_READS).write(6)]
    assert said(k=3) != alone, "the activation itself changes something"
    assert said(k=3, control="self") == alone, "B's own state changes nothing"
    assert said(k=3, control=StandIn("unrelated", unrelated="says alice")) == [
        r.text for r in activation(a, b, ["says alice"] * 2, B_READS, k=3, j=2).write(6)
    ]
    noise = activation(a, b, A_READS, B_READS, k=3, j=2, control="noise").write(2)
    true = activation(a, b, A_READS, B_READS, k=3, j=2).write(2)
    for x, y in zip(noise, true, strict=True):
        assert x.details["norm_sent"] == pytest.approx(y.details["norm_sent"], rel=1e-5)
    assert all(
        r.details["norm_sent"] == 0 for r in activation(a, b, A_READS, B_READS, k=3, j=2, control="zero").write(2)
    )


def test_noise_matches_the_norm_of_what_arrives_when_a_map_is_used(agents):
    a, b = agents
    W = 3 * jax.random.normal(jax.random.key(0), (b.params.config.width, a.params.config.width))
    how = dict(k=3, j=2, W=W)
    for noise, true in zip(
        activation(a, b, A_READS, B_READS, control="noise", **how).write(2),
        activation(a, b, A_READS, B_READS, **how).write(2),
        strict=True,
    ):
        assert noise.details["norm_after"] == pytest.approx(true.details["norm_after"], rel=1e-5)
        assert noise.logprob != true.logprob


def test_stop_tokens_come_from_where_the_checkpoint_lists_them(agents, tmp_path):
    import shutil

    from jaxcomm.evals.pair import folder

    copy = shutil.copytree(folder("a"), tmp_path / "copy")
    assert load_agent(copy).stop_tokens == (1,)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 7]}))
    assert load_agent(copy).stop_tokens == (1, 7)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_agent(copy).stop_tokens == (9, 1, 7), "all of them end an answer"
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 9]}))
    agent = load_agent(copy)
    assert agent.stop_tokens == (1, 5, 9, 7)
    jaxcomm("convert", copy, "--out", tmp_path / "again", "--dtype", "float16")
    assert load_agent(tmp_path / "again").stop_tokens == (1, 5, 9, 7)
    (copy / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        load_agent(copy)


def test_baselines_read_what_they_are_said_to_read(agents):
    a, b = agents
    assert skyline(a, b, A_READS, B_READS).write()[0].read == ("<s>", *A_READS[0].split(), *B_READS[0].split())
    reply = message(
        a, b, A_READS, B_READS, ask="who says : {prompt}", tell="{prompt} : {message}", max_message_tokens=5
    ).write()[0]
    wrote = start_turn(a, [f"who says : {A_READS[0]}"]).write(5)[0].text
    assert reply.details["message"] == wrote
    assert list(reply.read) == ["<s>", *B_READS[0].split(), ":", *wrote.split()]


def test_agents_talk_in_turns_and_each_keeps_what_it_took_part_in(agents):
    """Three messages of A, two of B between them: every prompt and text is what the agents alone make of the conversation so far."""
    for chat in (False, True):
        a, b = (dataclasses.replace(agent, chat=chat) for agent in agents)
        said, how = [], dict(ask="{prompt} says", reply="{message} {prompt} who ?", tell="{message} : {prompt}")
        user, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
        heard_a, heard_b = [user(f"{A_READS[0]} says")], []
        for n in range(3):
            said.append(start_turn(a, [heard_a]).write(4)[0].text)
            if n == 2:
                break
            heard_b.append(user(f"{said[-1]} {B_READS[0]} who ?" if n == 0 else said[-1]))
            said.append(start_turn(b, [heard_b]).write(4)[0].text)
            heard_b.append(assistant(said[-1]))
            heard_a += [assistant(said[-2]), user(said[-1])]
        turn = message(a, b, A_READS, B_READS, turns=3, max_message_tokens=4, **how)
        want = [*heard_b, user(f"{said[-1]} : {B_READS[0]}")]
        assert turn.rendered(0) == [b.render(want)]
        reply, alone = turn.write(4)[0], start_turn(b, [want]).write(4)[0]
        assert reply.details["said"] == said and reply.details["message"] == said[-1]
        assert reply.details["asked"] == a.render(f"{A_READS[0]} says") and reply.text == alone.text
        assert reply.flops > 5 * alone.flops / 2, "all that was said is paid for"
    with pytest.raises(ValueError, match="turns = 0: A writes at least once"):
        message(a, b, A_READS, B_READS, turns=0)
    with pytest.raises(ValueError, match="reply 'what'"):
        message(a, b, A_READS, B_READS, turns=2, reply="what")


def test_a_conversation_that_begins_with_a_system_turn_has_its_own(agents):
    _, b = agents
    told = dataclasses.replace(b, chat=True, system="the paris")
    assert told.render("who") == "<s> system : the paris user : who assistant :"
    own = [{"role": "system", "content": "rome"}, {"role": "user", "content": "who"}]
    assert told.render(own) == dataclasses.replace(told, system="").render(own)
    assert dataclasses.replace(b, system="the paris").render("who") == "the paris\n\nwho"


def test_templates_are_given_tools_and_choices_are_not_scored_within_a_thought(agents):
    from jaxcomm.evals.choices import logprobs
    from jaxcomm.evals.games import Game, Item

    _, b = agents
    words = toy_tokenizer([*WORDS, "<think>", "</think>"])
    words.add_tokens(["<think>", "</think>"])
    words.chat_template = "<s> {% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}{{ m.content }} {% endfor %}<think>"
    tool = {"name": "rome"}
    thinking = dataclasses.replace(b, tokenizer=words, chat=True, chat_args={"tools": [tool]})
    assert thinking.render("who") == "<s> rome who <think>"
    game = Game("who", (Item("alice", "who", "bob", ("bob", "rome")),))
    turn = dataclasses.replace(start_turn(b, ["who"]), agent=thinking, rows=[words.encode("who <think>")])
    with pytest.raises(ValueError, match=r"begins a thought.*--no-choices"):
        logprobs(turn, game, chat=True)


def test_chat_prompts_go_through_each_tokenizers_template_once(agents):
    _, b = agents
    chatty = dataclasses.replace(b, chat=True)
    assert b.tokens(chatty.encode("where is bob ?")) == [
        "<s>",
        "user",
        ":",
        "where",
        "is",
        "bob",
        "?",
        "assistant",
        ":",
    ], "the template writes BOS, the tokenizer must not again"
    reply = activation(chatty, chatty, A_READS, B_READS, k=1, j=1).write(2)[0]
    assert reply.details["sent_token"] == ":" and reply.read[-1] == ":"


def test_sampled_answers_follow_the_seed(agents):
    from jaxcomm.decoding import Sampling

    said = lambda seed: [r.text for r in silent(*agents, A_READS, B_READS).write(sampling=Sampling(2.0), seed=seed)]
    assert said(1) == said(1) != said(2)


def test_flops_equal_the_compilers_count_for_a_forward_pass():
    """XLA counts what of the attention's blocks is masked too, and a little for norms and softmax."""
    T = 512
    c = ModelConfig(vocab=512, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, ff=512, max_positions=T)
    params = init_params(jax.random.key(0), c).unroll()
    counted = jax.jit(forward).lower(params, np.zeros((1, T), np.int32)).compile().cost_analysis()["flops"]
    blocks = sum((T // BLOCKS) * end for end in range(T // BLOCKS, T + 1, T // BLOCKS))  # pairs that are scored
    masked = 4 * c.heads * c.head_dim * (blocks - T * (T + 1) // 2) * c.layers
    ours = blocks_flops(c, T) + T * 2 * c.width * c.vocab + masked
    assert ours < counted < 1.08 * ours


def test_generation_flops_equal_reading_everything_once(llama):
    c = llama.params.config
    heads = 2 * c.width * c.vocab
    # In the last block nine tokens of the prompt make no queries, do not look back and go through no MLP.
    unasked = 9 * 2 * (2 * c.width * c.heads * c.head_dim + 3 * c.width * c.ff) + 45 * 4 * c.heads * c.head_dim
    assert generation_flops(c, 10, 5) == blocks_flops(c, 14) - unasked + 5 * heads


def test_play_writes_one_line_per_result_and_per_item(tmp_path):
    to = ["--json", tmp_path / "r.jsonl", "--items", tmp_path / "i.jsonl"]
    jaxcomm("play", "--a", "pair:a", "--b", "pair:a", "--k", 4, "--j", 3, "--n", 5, *to)
    silent, result, other = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert (silent["protocol"], result["control"], other["control"]) == ("silent", None, "other"), "by default"
    assert {"game", "pair", "protocol", "graft", "k", "j", "accuracy", "low", "high", "n", "flops", "seconds"} <= set(
        result
    )
    assert (result["game"], result["n"], result["k"], result["j"], result["graft"]) == ("countries", 5, 4, 3, "replace")
    rows = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()][5:10]
    assert [r["prompt_a"] for r in rows] == [i.prompt_a for i in countries(0, 5)]
    assert (result["games_seed"], result["names"], result["chat"], result["dtype"]) == (0, "seen", False, "float32")
    assert np.mean([r["hit"] for r in rows]) == result["accuracy"] and rows[0]["details"]["sent_token"] == "."


PLAY = ["play", "--a", "pair:a", "--b", "pair:a"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (PLAY, "activation needs --k (A's layer) and --j (B's layer)"),
        (["convert", "there", "--out", "there"], "there exists: choose another folder"),
        ([*PLAY, "--protocol", "silent", "--k", 3], "do not apply to the protocol silent"),
        ([*PLAY, "--k", 1, "--j", 1, "--top-p", 0.9], "--top-p needs --temperature"),
        ([*PLAY, "--k", 1, "--j", 1, "--json", "there"], "there is a folder: name a file"),
    ],
)
def test_errors_are_one_line_that_names_the_remedy(tmp_path, monkeypatch, capsys, arguments, remedy):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert remedy in refused(capsys, *arguments)


def test_a_refusal_is_the_last_line_and_the_exit_status(tmp_path):
    """Once as the shell sees it."""
    command = [sys.executable, "-m", "jaxcomm.evals", *PLAY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("jaxcomm: activation needs") and done.stderr.count("\n") == 1


def test_import_is_light():
    code = "import sys, jaxcomm; print([m for m in ('transformers', 'torch', 'matplotlib', 'scipy.stats', 'orbax') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, b: activation(a, b, A_READS, B_READS, k=9, j=1), "k = 9 is out of range"),
        (lambda a, b: activation(a, b, A_READS, B_READS, k=1, j=9), "j = 9 is out of range"),
        (
            lambda a, b: activation(a, b, A_READS[:1], B_READS[:1], k=1, j=1, control="other"),
            "needs at least two items",
        ),
        (lambda a, b: activation(a, b, A_READS, B_READS, k=1, j=1, control="odd"), "unknown control 'odd'"),
        (lambda a, b: activation(a, b, A_READS, B_READS, k=1, j=1, graft="sum", where="all"), "need equal widths"),
        (lambda a, b: activation(a, b, A_READS, B_READS[:1], k=1, j=1), "A has 2 prompts, B has 1"),
        (lambda a, b: silent(a, b, A_READS, B_READS).write(0), "max_new_tokens = 0: it must be at least 1"),
        (lambda a, b: silent(a, b, A_READS, ["who ?", " "]), "empty prompt at row 1"),
        (lambda a, b: silent(a, b, A_READS, ["alice " * 1100]), "a prompt of 1101 tokens does not fit"),
        (lambda a, b: dataclasses.replace(a, chat=True, tokenizer=without_template(a)), "has no chat template"),
        (
            lambda a, b: dataclasses.replace(a, params=smaller(a)).encode("alice is"),
            "the model has 5 tokens: leave it out",
        ),
        (lambda a, b: dataclasses.replace(a, longest=0), "longest = 0 leaves no room for a prompt"),
    ],
)
def test_bad_input_is_one_clear_line(agents, call, message):
    with pytest.raises(ValueError) as error:
        call(*agents)
    assert message in str(error.value) and "\n" not in str(error.value)


def without_template(agent: Agent):
    import copy

    tokenizer = copy.deepcopy(agent.tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def smaller(agent: Agent):
    return agent.params.replace(config=dataclasses.replace(agent.params.config, vocab=5))
