"""What communication costs: the paper's formulas by hand, exact counts beside XLA's, and each answer's FLOPs."""

import dataclasses

import pytest

from jaxcomm.config import Heads, ModelConfig, Rope
from jaxcomm.evals import cost
from jaxcomm.evals.evaluation.settings import EvalSettings
from jaxcomm.flops import (
    blocks_flops,
    generation_flops,
    head_flops,
    paper_activation,
    paper_layer,
    paper_message,
    reading_flops,
)

from evaluations import items, run


def test_the_papers_formulas_by_hand():
    c = dataclasses.replace(cost.SHAPES["llama-3.2-3b"])
    D, KH, H, F, V, L = 3072, 128 * 24, 24, 8192, 128256, 28
    layer = lambda n: 8 * n * D * KH + 4 * n**2 * KH + 3 * H * n**2 + 4 * n * D * F
    assert paper_layer(c, 7) == layer(7)
    P, M, T, k = 10, 20, 3, 26
    assert paper_message(c, c, P, M, T) == M * (4 * P * V * D + L * layer(P)) + T * (
        4 * (P + M) * V * D + L * layer(P + M)
    )
    want = 2 * P * V * D + k * layer(P) + T * (4 * P * V * D + L * layer(P)) + D
    assert paper_activation(c, c, P, T, k, False) == want
    assert paper_activation(c, c, P, T, k, True) == want + 2 * D * D


def test_the_exact_count_is_xlas_within_a_few_percent():
    """XLA counts the masked half of attention and the norms too, which here is little."""
    a, b = cost.SHAPES["llama-3.2-3b"], cost.SHAPES["llama-3.1-8b"]
    counted = [count for count in cost.counts(a, b, 48, 32, 6, 20, 9, compiled=True) if count.compiled is not None]
    assert {"kv", "activation", "message"} <= {count.protocol for count in counted}
    for count in counted:
        assert 0.999 < count.compiled / count.exact < 1.02 or count.protocol.startswith("activation")
        assert count.compiled / count.exact < 1.06, "the edited token goes through B twice"


@pytest.mark.parametrize("heads", [(), (*[Heads(4, 128)] * 3, Heads(2, 256, True))])
def test_layers_of_two_kinds_are_counted_each_by_its_own_size(heads):
    near, far = Rope(1e4), Rope(1e6, "proportional", 0.25)
    c = ModelConfig(32000, 1024, 4, 8, 4, 128, 4096, 4096, rope=(near, near, near, far), windows=(512, 512, 512, 0))
    c = dataclasses.replace(c, layer_heads=heads)
    found = {count.protocol: count for count in cost.counts(c, c, 48, 32, 6, 2, 3, compiled=False)}
    assert any(name.startswith("bridge") for name in found) == c.alike, "a bridge needs keys of one shape"
    assert 0.99 < cost.xla_writing(c, 48, 1) / generation_flops(c, 48, 1) < 1.03
    if heads:
        assert (
            0.99
            < cost.xla_activation(c, c, 48, 1, 2, 3, False)
            / (generation_flops(c, 48, 1) + blocks_flops(c, 48, blocks=2))
            < 1.1
        )
    layer = [
        8 * 48 * 1024 * n + 4 * 48**2 * n + 3 * 8 * 48**2 + 4 * 48 * 1024 * 4096
        for n in (1024, 2048 if heads else 1024)
    ]
    reading = 4 * 48 * 32000 * 1024 + 3 * layer[0] + layer[1]
    assert found["activation"].paper == 2 * 48 * 32000 * 1024 + 2 * layer[0] + 6 * reading + 1024


def test_layers_and_tokens_that_cannot_be_are_not_counted():
    a, b = cost.shape("pair:a"), cost.shape("pair:b")
    for asked, said in (
        ((8, 8, 8, 26, 1), "k = 26 is out of range"),
        ((8, 8, 8, 1, 9), "j = 9"),
        ((8, 0, 8, 1, 1), "0 message"),
    ):
        with pytest.raises(ValueError, match=said):
            list(cost.counts(a, b, *asked, compiled=False))


def test_less_than_a_quarter_is_a_fact_about_models_without_a_cache():
    """The claim of section 3.2, at the paper's models and layers."""
    a, b = cost.SHAPES["llama-3.2-3b"], cost.SHAPES["llama-3.1-8b"]
    count = {c.protocol: c for c in cost.counts(a, b, 128, 256, 16, 26, 26, compiled=False)}
    assert count["activation"].paper < count["message"].paper / 4
    assert count["message"].exact / 4 < count["activation"].exact < count["message"].exact / 2


def test_rows_carry_the_flops_of_what_was_read_and_written(b, tmp_path):
    asked = EvalSettings(tasks=("countries_choice", "countries"), n=3, protocols=("single",))
    run(asked, b, tmp_path / "run")
    c = b.params.config
    for row in items(tmp_path / "run"):
        read, written = row["tokens_read"], row["tokens_written"]
        assert read == len(b.encode(row["prompt"]))
        if row["task"] == "countries":
            assert row["flops"] == generation_flops(c, read, written)
        else:
            least = reading_flops(c, read) + head_flops(c)
            assert least <= row["flops"] <= least + blocks_flops(c, 3, context=read) + 3 * head_flops(c)
