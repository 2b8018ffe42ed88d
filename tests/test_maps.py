"""Maps as files and the text they are fitted on: what was saved comes back, for the pair it was made for and no other."""

import copy
import dataclasses
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.converters import load_agent
from jaxcomm.evals import maps
from jaxcomm.evals import sentences as reading
from jaxcomm.evals.commands.fit_map import FitMap
from jaxcomm.evals.pair import NAMES, folder
from jaxcomm.evals.pair.text import statements
from jaxcomm.evals.sentences import read_both, sentences
from jaxcomm.evals.sweeps import fitting
from jaxcomm.kv_mapping import fit_kv_maps, map_cache
from jaxcomm.mapping import Maps
from jaxcomm.reading import prefill

KS, JS = (2, 5), (1, 3, 4)


@pytest.fixture(scope="module")
def pair():
    return [load_agent(folder(name), name=name, unroll=False) for name in NAMES]


def fitted(pair) -> maps.Fitted:
    widths = [agent.params.config.width for agent in reversed(pair)]
    W = np.random.default_rng(0).standard_normal((len(KS), len(JS), *widths)).astype(np.float32)
    found = Maps(jnp.asarray(W), jnp.asarray(W[:, :, 0, 0] ** 2))
    return maps.Fitted.of(found, ["one.", "two."], ks=KS, js=JS, recipe="ridge", text="my.txt", seed=3)


def assert_same(got: maps.Fitted, want: maps.Fitted) -> None:
    for field in dataclasses.fields(want):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), field.name)


def refused(call) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps") / "deep" / "w"
    maps.save(out, fitted(pair), *pair)
    return out


def test_what_is_loaded_is_what_was_saved(pair, saved):
    found, want = maps.load(saved, *pair), fitted(pair)
    assert_same(found, want)
    assert isinstance(found.W, np.ndarray) and found.W.dtype == np.float32
    np.testing.assert_array_equal(found.at(5, 3), want.W[1, 1])
    for k, j in ((3, 3), (2, 2)):
        assert (
            f"no W for k = {k}, j = {j}: it was fitted for k = 2, 5 and j = 1, 3, 4" in refused(lambda: found.at(k, j))  # noqa: B023
        )


def test_it_stays_with_its_pair(pair, saved):
    a, b = pair
    half = dataclasses.replace(a, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), a.params))
    nudged = dataclasses.replace(b, params=b.params.replace(embed=b.params.embed.at[3, 1].add(1e-6)))
    for others, names in (((half, b), ["a was a"]), ((a, nudged), ["b was b"]), ((b, a), ["a was a", "b was b"])):
        line = refused(lambda: maps.load(saved, *others))  # noqa: B023
        assert re.findall(r"\b[ab] was [ab]\b", line) == names and "fitted for another pair" in line
    unrolled = [dataclasses.replace(agent, params=agent.params.unroll()) for agent in pair]
    assert_same(maps.load(saved, *unrolled), fitted(pair))


def test_it_stays_with_how_its_pair_reads(pair, saved, tmp_path):
    """Text that was read raw, or through a chat template, and through which one."""

    def chatty(agent, template="{{ messages[0].content }}!"):
        made = dataclasses.replace(agent, tokenizer=copy.deepcopy(agent.tokenizer))
        made.tokenizer.chat_template = template
        return dataclasses.replace(made, chat=True)

    a, b = pair
    assert "fitted on text that a read raw: leave out --chat" in refused(lambda: maps.load(saved, chatty(a), b))
    assert "fitted on text that b read raw: leave out --chat" in refused(lambda: maps.load(saved, a, chatty(b)))
    maps.save(tmp_path / "chat", fitted(pair), chatty(a), chatty(b))
    assert "a read through its chat template: add --chat" in refused(lambda: maps.load(tmp_path / "chat", a, b))
    other = chatty(b, "{{ messages[0].content }}?")
    assert "another tokenizer or chat template of b" in refused(lambda: maps.load(tmp_path / "chat", chatty(a), other))
    assert_same(maps.load(tmp_path / "chat", chatty(a), chatty(b)), fitted(pair))


def test_maps_of_keys_and_values_come_back_for_their_pair_alone(pair, saved, tmp_path):
    a, b = pair
    text = sentences("statements:countries", 20)
    fit = fit_kv_maps(a.params, b.params, read_both(a, b, text), sources=2, stride=2)
    want = maps.FittedKV.of(fit, text, stride=2, text="my.txt", seed=3)
    maps.save(tmp_path / "kv", want, a, b)
    got = maps.load_kv(tmp_path / "kv", a, b)
    assert dataclasses.replace(got, maps=None) == dataclasses.replace(want, maps=None)
    assert (got.maps.sender, got.maps.receiver) == (fit.sender, fit.receiver)
    jax.tree.map(np.testing.assert_array_equal, got.maps, fit)
    cache = prefill(a.params, a.tokenize(text[:2]))[1]
    jax.tree.map(np.testing.assert_array_equal, *(map_cache(m, cache, a.params, b.params) for m in (got.maps, fit)))
    assert "fitted for another pair" in refused(lambda: maps.load_kv(tmp_path / "kv", b, a))
    assert "choose another folder" in refused(lambda: maps.save(tmp_path / "kv", want, a, b))
    assert "holds maps of keys and values, not of states" in refused(lambda: maps.load(tmp_path / "kv", a, b))
    assert "holds maps of states, not of keys and values" in refused(lambda: maps.load_kv(saved, a, b))


def test_a_folder_that_is_there_is_not_touched(pair, saved, tmp_path):
    assert "choose another folder" in refused(lambda: maps.save(saved, fitted(pair), *pair))
    (tmp_path / "file").write_text("mine")
    assert "choose another folder" in refused(lambda: maps.save(tmp_path / "file", fitted(pair), *pair))
    assert (tmp_path / "file").read_text() == "mine"
    assert_same(maps.load(saved, *pair), fitted(pair))


def test_a_save_that_was_killed_is_not_taken_for_maps(pair, saved, tmp_path):
    """Killed when all is written and nothing renamed; what it leaves is in nobody's way."""
    out = tmp_path / "w"
    code = f"""
        import os, signal
        from pathlib import Path
        import orbax.checkpoint as ocp
        from jaxcomm.converters import load_agent
        from jaxcomm.evals import maps
        from jaxcomm.evals.pair import folder
        pair = [load_agent(folder(name), name=name, unroll=False) for name in "ab"]
        ocp.CompositeCheckpointHandler.finalize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        maps.save(Path({str(out)!r}), maps.load(Path({str(saved)!r}), *pair), *pair)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    for path in (out, left):
        assert "holds no maps, or incomplete ones" in refused(lambda: maps.load(path, *pair))  # noqa: B023
    maps.save(out, fitted(pair), *pair)
    assert_same(maps.load(out, *pair), fitted(pair))


@pytest.mark.parametrize("lost", ["maps", "maps/d", "about", "about/metadata", "."])
def test_what_is_damaged_is_refused(pair, saved, tmp_path, lost):
    shutil.copytree(saved, tmp_path / "w")
    path = tmp_path / "w" / lost
    shutil.rmtree(path) if path.is_dir() else path.write_text("{")
    assert "make them with jaxcomm fit-map" in refused(lambda: maps.load(tmp_path / "w", *pair))


def test_sentences_of_files(tmp_path):
    text, lines = tmp_path / "t.txt", [f"Sentence {i}: it is number {i}." for i in range(30)]
    text.write_text("\n\n".join(lines) + "\n  \n")
    assert sentences(str(text)) == sentences(str(text), 30) == lines
    drawn = sentences(str(text), 12, seed=1)
    assert len(set(drawn)) == 12 and sorted(drawn, key=lines.index) == drawn != sentences(str(text), 12, seed=2)
    assert sentences(str(text), 12, seed=1) == drawn
    records = tmp_path / "t.jsonl"
    records.write_text("\n".join(json.dumps({"text": f" {x}\n{x}", "q": x[:10]}) for x in lines) + "\n\n")
    assert sentences(str(records)) == [f"{x}\n{x}" for x in lines]
    assert sentences(f"{records}:q") == [x[:10].strip() for x in lines]


def test_sentences_of_the_games_are_those_sweeps_fit_on():
    assert sentences("statements:countries", 50, seed=4) == [next(s) for s in [statements("countries", 4)] for _ in range(50)]  # fmt: skip
    assert fitting.read_text("statements", "tip_sheets") == fitting.own_statements("tip_sheets")
    assert fitting.own_statements("tip_sheets") == sentences("statements:tip_sheets", 1000, seed=fitting.FIT)
    assert len(sentences("statements:countries")) == 3072


def test_sentences_of_the_hub(monkeypatch):
    """As records stream: whole when short, up to the last sentence's end within 1000 characters when long."""
    import datasets

    long, endless = "It rains. " * 200, "and so on, " * 200
    records = [{"question": f"How many is {i}?\nSay it.", "n": 1} for i in range(50)] + [{"question": q} for q in (long, endless, " ")]  # fmt: skip
    asked = []

    def load_dataset(*where, **how):
        asked.append((where, how))
        return datasets.IterableDataset.from_generator(lambda: iter(records))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = sentences("hub:openai/gsm8k:main:train:question", 51, seed=1)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "streaming": True})]
    assert set(found) == {r["question"] for r in records[:50]} | {("It rains. " * 100).strip()}
    assert found == sentences("hub:openai/gsm8k:main:train:question", 51, seed=1)
    assert found != sentences("hub:openai/gsm8k:main:train:question", 51, seed=2)
    few = lambda: sentences("hub:openai/gsm8k::train:question", 52)
    assert "has 51 sentences, 52 were asked for" in refused(few) and asked[-1][0] == ("openai/gsm8k", None)
    assert "its fields are question, n" in refused(lambda: sentences("hub:openai/gsm8k:main:train:answer", 1))


def test_text_that_cannot_be_had_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "n": 1}\n[1]\n')
    (tmp_path / "u.jsonl").write_text('{"words": "a"}\n')
    c4 = "hub:allenai/c4:en:train:text"
    for source, message in (
        (str(tmp_path / "none.txt"), "is no file: name one with a sentence per line"),
        ("statements:chess", "there is no such game, only countries, tip_sheets and files"),
        (str(tmp_path / "t.jsonl"), "t.jsonl, line 2 is not a JSON object: '[1]'"),
        (str(tmp_path / "u.jsonl"), "no text in a field 'text': its fields are words"),
        ("hub:allenai/c4", "write hub:NAME:CONFIG:SPLIT:FIELD"),
        (c4, "check its name and the network, or name a local file"),
    ):
        assert message in refused(lambda: sentences(source))  # noqa: B023
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    assert "has 2 sentences, 3 were asked for" in refused(lambda: sentences(str(tmp_path / "few.txt"), 3))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'jaxcomm[eval]', or name a local file" in refused(lambda: sentences(c4))


def test_both_models_read_every_sentence_once(pair):
    text = sentences("statements:countries", 2 * reading.BATCH + 7)
    for side, agent in enumerate(pair):
        batches = [batch[side] for batch in read_both(*pair, text)]
        tokens, mask = (np.concatenate([getattr(b, name) for b in batches]) for name in ("tokens", "mask"))
        assert len({batch.shape[1] for batch in batches}) == 1
        assert [agent.tokenizer.decode(t[m]) for t, m in zip(tokens, mask, strict=True)] == [
            agent.tokenizer.decode(agent.encode(x)) for x in text
        ]


def test_fit_map_keeps_the_recipe_it_was_asked_for_and_shows_both(pair, tmp_path, capsys):
    kept, shown = {}, {}
    for recipe in ("ridge", "gradient"):
        out = tmp_path / recipe
        FitMap(
            a="pair:a", b="pair:b", ks=(5,), js=(1, 4), text="statements:countries", out=out, n=90, recipe=recipe
        ).run()
        kept[recipe] = maps.load(out, *pair)
        rows = [re.findall(r"[\d.]+", line) for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        shown[recipe] = np.array(rows, float)
    np.testing.assert_array_equal(shown["ridge"], shown["gradient"])
    assert shown["ridge"][:, :2].tolist() == [[5, 1], [5, 4]]
    for column, recipe in ((2, "ridge"), (3, "gradient")):
        assert kept[recipe].recipe == recipe
        np.testing.assert_allclose(kept[recipe].error[0], shown[recipe][:, column], atol=6e-4)
    assert (kept["ridge"].error < kept["gradient"].error).all()
    text = sentences("statements:countries", 90)
    assert kept["ridge"].sha256 == hashlib.sha256("\n".join(text).encode()).hexdigest()
    np.testing.assert_allclose(kept["ridge"].W, fitting.fit(*pair, text, (5,), (1, 4)).W, rtol=1e-5)
    again = dict(a="pair:a", b="pair:b", ks=(5,), js=(9,), text="statements:countries", n=90)
    assert "choose another folder" in refused(FitMap(**again, out=tmp_path / "ridge").run)
    assert "j = 9 is out of range" in refused(FitMap(**again, out=tmp_path / "new").run)
    assert not (tmp_path / "new").exists()
