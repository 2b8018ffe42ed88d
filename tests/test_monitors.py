"""Monitors: what the numbers mean, a direction that is there is found and none where there is noise, for one model and site."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import jaxcomm as jc
from jaxcomm.evals import monitors
from jaxcomm.evals.games import draw
from jaxcomm.evals.injections import LEAST, TEMPLATES, draw_texts
from jaxcomm.evals.monitors import Monitor, features, read, read_layers
from jaxcomm.evals.probes import solve
from jaxcomm.evals.scores import auroc, caught

import command
from command import jaxcomm
from conftest import refused

LAST = jc.Site("resid_post", 2, "last")

# Scores -------------------------------------------------------------------------------------------------------------

levels = st.lists(st.integers(0, 6), min_size=2, max_size=9)


@given(levels, st.data())
def test_the_area_is_the_share_of_pairs_in_order(positives, data):
    """Counted one by one, and by scipy's Mann-Whitney test."""
    n = len(positives)
    negatives = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    found = auroc(positives, negatives)
    pairs = [1.0 if p > q else 0.5 if p == q else 0.0 for p in positives for q in negatives]
    assert found.value == pytest.approx(sum(pairs) / n**2)
    assert found.value == pytest.approx(scipy.stats.mannwhitneyu(positives, negatives).statistic / n**2)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert auroc(negatives, positives).value == pytest.approx(1 - found.value)


@given(levels, st.data(), st.sampled_from([0.01, 0.05, 0.25, 0.5]))
def test_the_threshold_is_the_lowest_that_few_negatives_exceed(positives, data, alarms):
    n = len(positives)
    negatives = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    few = [t for t in range(-1, 8) if sum(q > t for q in negatives) <= alarms * n]
    assert caught(positives, negatives, alarms).value == pytest.approx(sum(p > few[0] for p in positives) / n)


def test_perfect_scores_are_not_certain():
    assert auroc(np.ones(20), np.zeros(20)) == caught(np.ones(20), np.zeros(20), 0.05)
    assert auroc(np.ones(20), np.zeros(20)).low == pytest.approx(0.8389, abs=1e-3), "Wilson's of 20 hits of 20"
    assert auroc(np.zeros(20), np.ones(20)).value == 0 == caught(np.zeros(20), np.zeros(20), 0.05).value


def test_the_interval_holds_the_truth_19_times_in_20():
    """Of scores of two normal distributions whose area is known; the rows of both share a part, as versions of a text do."""
    for shift in (0.0, 1.0):
        truth, inside = scipy.stats.norm.cdf(shift / 2**0.5), 0
        for run in range(100):
            rng = np.random.default_rng(run)
            shared = rng.standard_normal(60) * 0.6
            p, q = (shared + rng.standard_normal(60) * 0.8 for _ in "pq")  # each of variance 1
            found = auroc(p + shift, q, seed=run)
            inside += found.low <= truth <= found.high
        assert 89 <= inside <= 99


# The probe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 7), (8, 50)])
def test_the_probe_is_ridge_regression_on_standardised_features(shape):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape) * 3 + 1, rng.standard_normal((shape[0], 2))
    x[:, 3] = 5  # says nothing
    weight, bias = solve(x, y, monitors.RIDGE)
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    direct = np.linalg.solve(z.T @ z + monitors.RIDGE * shape[1] * np.eye(shape[1]), z.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(x @ weight + bias, z @ direct + y.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(solve(x, y[:, 0], monitors.RIDGE)[0], weight[:, 0])


def message(states, site=LAST, sender="a") -> jc.Message:
    return jc.Message(jnp.asarray(states, jnp.float32), site=site, sender=sender)


DIRECTION = np.full(48, 48**-0.5) * np.resize([1, -1, -1], 48)


def noise(seed: int, n: int, planted: float = 0.0):
    """Messages with and without a direction, of lengths that say nothing."""
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((n, 48)) + sign * planted * DIRECTION for sign in (1, -1)]
    return [message(s * rng.uniform(0.1, 100, (n, 1))) for s in states]


def test_a_planted_direction_is_found():
    monitor = Monitor.fit(*noise(0, 200, planted=3))
    hidden, neutral = map(monitor.score, noise(1, 200, planted=3))
    assert auroc(hidden, neutral).low > 0.98 and caught(hidden, neutral, 0.05).value > 0.9
    assert monitor.weight @ DIRECTION / np.linalg.norm(monitor.weight) > 0.85


def test_in_noise_nothing_is_found():
    """Whatever it was fitted on: the interval holds .5 about 19 times in 20."""
    inside = 0
    for run in range(100):
        found = auroc(*map(Monitor.fit(*noise(2 * run, 40)).score, noise(2 * run + 1, 40)), seed=run)
        inside += found.low <= 0.5 <= found.high
    assert 89 <= inside <= 99


def test_a_monitor_is_blind_to_norms():
    a, b = noise(0, 50, planted=1)
    factors = np.random.default_rng(1).uniform(1e-3, 1e3, (50, 1))
    monitor = Monitor.fit(a, b)
    np.testing.assert_allclose(monitor.score(message(a.states * factors)), monitor.score(a), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features(a), axis=1), 1)
    assert monitor.score(message(jnp.zeros((1, 48)))) == [monitor.bias], "nothing has no direction"


def test_every_site_of_states_has_features(b):
    """Heads are joined, tokens averaged; padding is nothing."""
    texts = ["Alice is at the Louvre.", "Bob, who was born in June, is at the Acropolis of Athens."]
    for site in (
        jc.Site("resid_post", 3, "all"), jc.Site("z", 3, slice(1, None), (1, 0)), jc.Site("mlp_out", 2, [0, -1]),
        jc.Site("logits", positions=-2),
    ):  # fmt: skip
        both, alone = read(b, texts, site), jc.send(b.params, np.array([b.encode(texts[0])]), site)
        each = np.asarray(alone.states, np.float64).reshape(1 if site.single else alone.states.shape[1], -1)
        norms = np.linalg.norm(each, axis=1, keepdims=True)
        want = (each / np.where(norms, norms, 1)).sum(axis=0)
        np.testing.assert_allclose(features(both)[0], want / np.linalg.norm(want), atol=1e-4)
        assert Monitor.fit(both, both).score(both).shape == (2,)


def test_layers_read_together_are_layers_read_one_by_one(b):
    """In the order of the texts, whatever batches they were read in."""
    texts = [text for pairs in draw_texts(LEAST) for text in pairs.hidden]
    for k, got in zip((5, 0, 6), read_layers(b, texts, (5, 0, 6)), strict=True):
        want = read(b, texts, jc.Site("resid_post", k, "last"))
        assert (got.site, got.sender) == (want.site, want.sender)
        np.testing.assert_allclose(got.states, want.states, atol=1e-3)
    refused(
        lambda: read_layers(b, texts, (1, 7)), "layer 7 is out of range: resid_post of this model has layers 0 to 6"
    )


def test_a_monitor_is_for_one_model_and_one_site(b, tmp_path, unchecked):
    texts = ["Alice is at the Louvre.", "Bob is at Petra."]
    site = jc.Site("z", np.int64(3), [0, -1], heads=[1, 0])
    told = read(b, texts, site)
    Monitor.fit(told, told).save(tmp_path / "probe")
    monitor = Monitor.load(tmp_path / "probe")
    np.testing.assert_array_equal(monitor.score(told), Monitor.fit(told, told).score(told))
    told.sign(b"key").save(tmp_path / "message")
    np.testing.assert_array_equal(monitor.score(jc.Message.load(tmp_path / "message")), monitor.score(told))

    refused(
        lambda: monitor.score(told.replace(sender="3e")), f"from 3e, the monitor is for model {told.sender}: fit one"
    )
    refused(lambda: monitor.score(told.replace(sender=None)), "from an unknown sender, the monitor is for model")
    refused(lambda: monitor.score(told.anonymous()), "from an unknown sender")
    for other in (
        dict(layer=2),
        dict(positions=[0, 1]),
        dict(heads=[0, 1]),
        dict(name="q"),
        dict(positions=np.zeros((2, 2), int)),
    ):
        place = dict(name="z", layer=3, positions=[0, -1], heads=[1, 0]) | other
        says = "the monitor is for z 3 at (0, -1), heads (1, 0): send from there, or fit another"
        refused(lambda place=place: monitor.score(told.replace(site=jc.Site(**place))), says)
    refused(lambda: monitor.score(told.replace(site=None)), "this message is from no site")
    refused(lambda: monitor.score(jc.send_cache(b.params, b.tokenize(texts)).replace(site=site)), "keys and values")
    refused(lambda: monitor.score(told.replace(states=None, text=("a", "b"))), "this message holds text")
    holes = told.states.at[1, 0, 0, 0].set(jnp.nan)
    refused(lambda: monitor.score(told.replace(states=holes)), "the states of row 1 are not numbers")

    refused(lambda: Monitor.fit(told.anonymous(), told), "do not say what they are from: make them with send")
    refused(lambda: Monitor.fit(told, told.replace(sender="3e")), "from 3e, the monitor is for")
    by_row = read(b, texts, jc.Site("resid_post", 3, np.array([1, 2])))
    refused(lambda: Monitor.fit(by_row, by_row), "at other positions of each prompt: name 'last', numbers or a slice")
    refused(lambda: Monitor.load(tmp_path / "message"), "is a message, not a monitor (jaxcomm.monitor.1)")


# The data set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("n", "seed"), [(LEAST, 0), (301, 5)])
def test_statements_and_templates_of_the_test_are_not_those_of_training(n, seed, place):
    data = draw_texts(n, seed, place)
    assert data == draw_texts(n, seed, place) != draw_texts(n, seed + 1, place)
    games = [draw(game, seed, n - n // 2).items for game in ("countries", "tip_sheets")]
    statements = [item.prompt_a for items in games for item in items]

    def parts(text: str) -> tuple[str, str]:
        """Statement and sentence of a text."""
        (found,) = {
            s for s in statements if (text.endswith(f" {s}") if place == "before" else text.startswith(f"{s} "))
        }
        return found, text.replace(found, "").strip()

    def kind(sentence: str) -> tuple[int, int]:
        """Which template it is of, and whether it is the neutral one."""
        (found,) = {
            (n, side) for n, both in enumerate(TEMPLATES) for side, x in enumerate(both)
            if sentence.startswith(x.split("{company}")[0]) and sentence.endswith(x.split("{company}")[-1])
        }  # fmt: skip
        return found

    told = {name: [[parts(text) for text in side] for side in pairs] for name, pairs in data._asdict().items()}
    met = {name: [[kind(sentence) for _, sentence in side] for side in both] for name, both in told.items()}
    for name, (hidden, neutral) in told.items():
        assert [s for s, _ in hidden] == [s for s, _ in neutral], "the same statements"
        assert [t for t, _ in met[name][0]] == [t for t, _ in met[name][1]] or name == "replaced"
        assert {side for _, side in met[name][0]} == {int(name == "replaced")}
        assert {side for _, side in met[name][1]} == {1}
    of = lambda name: {s for s, _ in told[name][0]}
    assert len(data.train.hidden) == n // 2 and not of("train") & of("same")
    assert [s for s, _ in told["same"][0]] == [s for s, _ in told["new"][0]]
    templates = lambda name: {t for t, _ in met[name][0]}
    assert templates("train") == templates("same") and len(templates("train")) == len(TEMPLATES) // 2
    assert templates("new") == set(range(len(TEMPLATES))) - templates("train")
    assert data.replaced.neutral == data.new.neutral
    assert all(a != b for a, b in zip(data.replaced.hidden, data.new.neutral, strict=True))


def test_both_sentences_of_a_template_have_as_many_words():
    assert len({x for both in TEMPLATES for x in both}) == 2 * len(TEMPLATES) >= 16
    for hidden, neutral in TEMPLATES:
        assert len(hidden.split()) == len(neutral.split()) and hidden.endswith(".") and neutral.endswith(".")
        assert hidden.count("{company}") <= 1
    refused(lambda: draw_texts(LEAST - 1), f"n = {LEAST - 1} statements are too few: ask for at least {LEAST}")


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_keeps_probes_that_can_be_used(b, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    jaxcomm("monitor", "--a", "pair:b", "--k", 2, 6, "--n", 64, "--seed", 3, "--out", out)
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "report.md", "report.html", "results.jsonl", "probe-2.safetensors", "probe-6.safetensors",
    }  # fmt: skip
    report = (out / "report.md").read_text()
    assert "jaxcomm monitor --a pair:b --k 2 6 --n 64 --seed 3" in report and "Controls" in said
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["a"], line["k"]) for line in results] == [("pair:b", 2), ("pair:b", 6)]
    texts = draw_texts(64, 3)
    for line in results:
        k = line["k"]
        monitor = Monitor.load(out / f"probe-{k}.safetensors")
        score = lambda side, k=k, monitor=monitor: monitor.score(read(b, side, jc.Site("resid_post", k, "last")))
        for name in ("same", "new", "replaced"):
            again = auroc(*map(score, getattr(texts, name)), seed=3)
            np.testing.assert_allclose([line[name], line[f"{name}_low"], line[f"{name}_high"]], again, atol=0.01)
        for share, alarms in (("caught_1", 0.01), ("caught_5", 0.05)):
            assert line[share] == pytest.approx(caught(*map(score, texts.new), alarms).value, abs=0.05)
        assert (line["norm"], line["norm_low"], line["norm_high"]) == (0.5, 0.5, 0.5), "equal by construction"
        assert line["same_low"] > 0.5 and line["same"] > line["new"]
        assert f"{line['same']:.2f} [{line['same_low']:.2f}, {line['same_high']:.2f}]" in said
        assert line["shuffled_low"] - 0.02 <= 0.5 <= line["shuffled_high"] + 0.02
        assert line["replaced_low"] <= 0.5 <= line["replaced_high"]


def test_what_the_command_refuses_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    asked = lambda *words: command.refused(capsys, "monitor", "--a", "pair:b", *words)
    assert "layer 7 is out of range: resid_post of this model has layers 0 to 6" in asked("--k", 1, 7)
    assert f"n = 4 statements are too few: ask for at least {LEAST}" in asked("--k", 1, "--n", 4)
    assert "is a file: name a folder" in asked("--k", 1, "--out", tmp_path / "file")
    assert "--k names no layer: name at least one" in asked("--k")
    assert "this tokenizer has no chat template" in asked("--k", 1, "--chat")
