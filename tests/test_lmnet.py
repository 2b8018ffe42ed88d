"""Networks of language models: exact where they must be, and the same to everything that reads and writes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm import lmnet
from jaxcomm.cache import Attended
from jaxcomm.compiled import check_layer
from jaxcomm.config import EdgeConfig, ModelConfig, Rope
from jaxcomm.flops import blocks_flops, generation_flops, head_flops
from jaxcomm.language_model import positions_of
from jaxcomm.model import Params, embed, final_norm, run_blocks, unembed
from jaxcomm.model import init_params as init_model
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.sharding import fsdp_shardings, local_mesh

from conftest import assert_close, compiles, make_checkpoint, prompts, read, refused, write

QWEN_HALF_BILLION = ModelConfig(
    vocab=151936, width=896, layers=24, heads=14, kv_heads=2, head_dim=64, ff=4864, max_positions=32768, qkv_bias=True,
    rope=Rope(theta=1e6),
)  # fmt: skip
KINDS = {
    "block": dict(edge=EdgeConfig()),
    "gqa, no residual, mean": dict(edge=EdgeConfig(attention="gqa", residual=False, zero_init=False), aggregate="mean"),
    "attention, concat": dict(edge=EdgeConfig("attention"), aggregate="concat"),
    "mlp, interior streams as they are": dict(edge=EdgeConfig("mlp"), norm=False),
    "linear, no factor": dict(edge=EdgeConfig("linear", scale=None)),
}


def perturbed(network: lmnet.Network, seed: int = 0, by: float = 0.1) -> lmnet.Network:
    """Its edges moved away from where they begin, which is next to nothing at all."""
    leaves, tree = jax.tree.flatten((network.edges, network.joints))
    rng = np.random.default_rng(seed)
    moved = [jnp.asarray(np.asarray(leaf) + by * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    wires, joints = jax.tree.unflatten(tree, moved)
    return network.replace(edges=wires, joints=joints)


def networks(llama, **how) -> lmnet.Network:
    return perturbed(lmnet.init_network(jax.random.key(0), llama.params, **{"widths": (1, 2, 1), **how}))


def test_a_network_of_one_vertex_is_the_model(attending):
    tokens = prompts(2, 11)
    network = lmnet.init_network(jax.random.key(0), attending.params, (1,))
    assert_close(read(network, tokens), read(attending.params, tokens), attending.name, 1e-6)
    assert not jax.tree.leaves((network.edges, network.joints))


@pytest.mark.parametrize(("norm", "scale"), [(True, 1.0), (False, None)])
def test_two_vertices_and_an_identity_edge_are_the_stack_twice(attending, norm, scale):
    tokens, edge = prompts(2, 11), EdgeConfig("identity", scale=scale)
    network = lmnet.init_network(jax.random.key(0), attending.params, (1, 1), edge=edge, norm=norm)
    positions = positions_of(Prompts(tokens))
    once = run_blocks(attending.params, embed(attending.params, tokens, positions), positions)[0]
    once = final_norm(attending.params, once) if norm else once
    assert_close(
        read(network, tokens),
        unembed(attending.params, run_blocks(attending.params, once, positions)[0]),
        attending.name,
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_new_edges_pass_on_what_they_get(family, tmp_path):
    params = make_checkpoint(tmp_path, family, seed=3).params
    tokens = prompts(2, 9)
    logits = [
        read(lmnet.init_network(jax.random.key(0), params, (1, 3, 1), edge=kind), tokens)
        for kind in ("block", "identity")
    ]
    assert_close(*logits, "a block that begins at 0", 1e-5)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_cached_generation_equals_the_full_forward_pass(llama, how):
    network = networks(llama, **how)
    padded = left_pad([[5, 6, 7], [8, 9, 10, 11, 12]], 8)
    tokens, mask = padded.tokens, padded.mask
    out = write(network, padded, max_new_tokens=6)
    whole, real = (
        np.concatenate([tokens, out.tokens], axis=1),
        np.concatenate([mask, np.ones_like(out.tokens, bool)], axis=1),
    )
    logits = read(network, Prompts(whole, real))[:, tokens.shape[1] - 1 : -1]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), out.tokens)
    logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(out.tokens)[..., None], axis=-1)
    assert_close(out.logprobs, logprobs[..., 0], "log-probabilities")


def test_separate_models_of_unequal_width_and_both_layouts(llama, wide):
    a, b = llama.params, wide.params
    network = perturbed(lmnet.init_network(jax.random.key(0), [a, b, a, a], (1, 2, 1)))
    assert [group[2:] for group in network.config.groups.values()] == [(0, 1), (1, 1), (0, 1), (0, 1)]
    unrolled = network.replace(models=tuple(m.unroll() for m in network.models))
    tokens = prompts(2, 10)
    out = write(unrolled, tokens, max_new_tokens=5)
    logits = read(network, np.concatenate([tokens, out.tokens], axis=1))[:, 9:-1]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), out.tokens)


def torch_network(pair, network: lmnet.Network, tokens: np.ndarray, wire=lambda layer, i, j, x: x) -> torch.Tensor:
    """The same network with transformers' modules and plain loops, float64: shared stack, LlamaDecoderLayer on each edge.

    wire(layer, i, j, x): what arrives of what the edge from vertex i of a layer to vertex j of the next one carries.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    vertex = pair.torch.double()
    config = type(vertex.config)(
        **{**vertex.config.to_dict(), "num_key_value_heads": vertex.config.num_attention_heads}
    )
    config._attn_implementation = "eager"
    names = {"self_attn.{}_proj": ("attention", "qkvo"), "mlp.{}_proj": ("mlp", ("gate", "up", "down"))}
    T = tokens.shape[1]
    positions = torch.arange(T)[None]
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def edge(weights, x):
        state = {
            form.format(m) + ".weight": weights[part][m]["weight"] for form, (part, of) in names.items() for m in of
        }
        state |= {"input_layernorm.weight": weights["attention_norm"]["weight"]}
        state |= {"post_attention_layernorm.weight": weights["mlp_norm"]["weight"]}
        block = LlamaDecoderLayer(config, 0).double().eval()
        block.load_state_dict({name: torch.tensor(np.asarray(w, np.float64)) for name, w in state.items()})
        turns = vertex.model.rotary_emb(x, positions)
        return float(weights["scale"]) * block(
            x, attention_mask=mask, position_ids=positions, position_embeddings=turns
        )

    with torch.no_grad():
        xs = [vertex.model(torch.tensor(tokens)).last_hidden_state]
        for layer, width in enumerate(network.config.widths[1:]):
            weights = network.edges[f"edge {layer}.0-0"]
            pick = lambda i, j, weights=weights: jax.tree.map(lambda w: w[i, j], weights)
            fed = [sum(wire(layer, i, j, edge(pick(i, j), x)) for i, x in enumerate(xs)) for j in range(width)]
            xs = [vertex.model(inputs_embeds=x).last_hidden_state for x in fed]
        logits = vertex.lm_head(xs[0])
    pair.torch.float()
    return logits


def test_a_plain_pytorch_network_gives_the_same_logits(llama):
    network = networks(llama, widths=(1, 2, 2, 1))
    tokens = prompts(1, 650, seed=4)
    assert_close(read(network, tokens), torch_network(llama, network, tokens), "650 positions", 2e-5)


# Controls on edges ---------------------------------------------------------------------------------------------------

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
ANSWERS = np.array([[[20, 21, 22], [23, -1, -1]], [[24, 25, -1], [26, 27, 28]], [[29, 30, 31], [32, 33, -1]]], np.int32)
RIGHT = ["x", "y", "z"]


def torch_controlled(llama, network, control: str, inside) -> np.ndarray:
    """Log-probabilities of ANSWERS after ROWS with a control on edges inside(layer, i, j): one row after the other."""

    def carried(row: int, answer: np.ndarray, like: int) -> dict:
        """What every edge carries of a row, in the columns of another, aligned at the prompts' ends."""
        own, n, P, seen = ROWS[row], int((answer >= 0).sum()), len(ROWS[row]), {}
        tokens = np.array([[*own, *answer[:n]]])
        torch_network(llama, network, tokens, lambda *at: seen.setdefault(at[:3], at[3]))
        told = [max(0, c + P - len(ROWS[like])) for c in range(len(ROWS[like]))]
        columns = told + [P + min(t, n - 2) for t in range(ANSWERS.shape[2])]
        return {edge: x[:, columns] for edge, x in seen.items()}

    found, order = np.zeros(ANSWERS.shape), jc.derange(RIGHT, 0)
    for row, c in np.ndindex(*ANSWERS.shape[:2]):
        answer, n, P = ANSWERS[row, c], int((ANSWERS[row, c] >= 0).sum()), len(ROWS[row])
        if control == "other":
            put = carried(order[row], answer, row)
        else:
            every = [carried(other, ANSWERS[other, c], row) for other in range(3) if other != row]
            put = {edge: sum(x[edge] for x in every) / 2 * (control == "mean") for edge in every[0]}
        arrives = lambda *at, put=put, end=P + n: put[at[:3]][:, :end] if inside(*at[:3]) else at[3]
        logits = torch_network(llama, network, np.array([[*ROWS[row], *answer[:n]]]), arrives)
        likely = torch.log_softmax(logits[0, P - 1 : -1], -1)
        found[row, c, :n] = likely[range(n), answer[:n]]
    return found


@pytest.mark.parametrize("control", ["other", "mean", "zero"])
def test_controlled_edges_equal_plain_pytorch(llama, control):
    network = networks(llama, widths=(1, 2, 2, 1))
    sets = {
        "no edges": lambda layer, i, j: False,
        "all edges": lambda layer, i, j: True,
        "edges into layer 2": lambda layer, i, j: layer == 1,
        "edge 1.1 -> 2.0": lambda layer, i, j: (layer, i, j) == (1, 1, 0),
    }
    found = lmnet.control_edges(network, left_pad(ROWS, 6), ANSWERS, control, edges=list(sets), right=RIGHT)
    for name, inside in sets.items():
        assert_close(found[name], torch_controlled(llama, network, control, inside), name, 2e-5)


def test_no_edges_are_the_network_itself_and_the_last_layers_edges_are_all(llama):
    network, padded = networks(llama, widths=(1, 2, 2, 1)), left_pad(ROWS, 6)
    own = jc.score(network, *jc.prefill(network, padded), ANSWERS)[0]
    for control in ("other", "mean", "moments", "noise", "zero"):
        names = ["no edges", "all edges", "edges into layer 3"]
        found = lmnet.control_edges(network, padded, ANSWERS, control, edges=names)
        assert_close(found["no edges"], own, control)
        np.testing.assert_array_equal(found["all edges"], found["edges into layer 3"])
        assert np.abs(found["all edges"] - own).max() > 1e-3, control


def test_of_prompts_of_one_length_other_is_the_network_that_reads_the_other_prompt(llama):
    network, rows = networks(llama), prompts(5, 7)
    answers = np.random.default_rng(0).integers(0, 97, (5, 3, 2)).astype(np.int32)
    order = jc.derange(range(5), 3)
    want = jc.score(network, *jc.prefill(network, rows[order]), answers)[0]
    found = lmnet.control_edges(network, rows, answers, "other", seed=3)
    assert [*found] == ["all edges", "edges into layer 1", "edges into layer 2"]
    for name, logprobs in found.items():
        assert_close(logprobs, want, name)


def test_edges_that_all_carry_the_same_have_no_content(tmp_path):
    gpt = make_checkpoint(tmp_path, "gpt2", seed=1).params
    blind = gpt.replace(norm=gpt.norm | {"weight": jnp.zeros_like(gpt.norm["weight"])})
    network = lmnet.init_network(jax.random.key(0), [blind, gpt], (1, 1), edge="linear")
    found = lmnet.control_edges(network, left_pad(ROWS), ANSWERS, "other", edges=["no edges", "all edges"])
    np.testing.assert_array_equal(found["no edges"], found["all edges"])
    zero = lmnet.control_edges(network, left_pad(ROWS), ANSWERS, "zero", edges=["all edges"])
    assert np.abs(zero["all edges"] - found["all edges"]).max() > 0.1, "and presence it has"


def test_with_zeros_on_its_edges_a_network_knows_nothing(llama):
    network = lmnet.init_network(jax.random.key(0), llama.params, (1, 1), edge="identity")
    found = lmnet.control_edges(network, left_pad(ROWS), ANSWERS, "zero", edges=["all edges"])["all edges"]
    assert_close(found, np.where(ANSWERS < 0, 0, -np.log(97)), "every token is equally likely")


def test_what_arrives_is_what_the_wire_makes_of_it_in_this_pass_alone(llama):
    network, tokens = networks(llama), prompts(2, 6)
    positions = positions_of(Prompts(tokens))
    alter = lambda name, x: 2 * x if name.startswith("edge") else x + 1
    late = lambda name, x: x.at[..., -1, :].set(alter(name, x)[..., -1, :])
    read = lambda wire: jax.jit(functools.partial(network.read, wire=wire))
    own = lambda name, x: x
    whole, _ = read(late)(tokens, positions)
    attended = Attended(cache=network.empty_cache(2, 5))
    _, cache = read(own)(tokens[:, :5], positions[:, :5], attended=attended)
    past = Attended((cache.replace(positions=positions[:, :5]),))
    last, _ = read(alter)(tokens[:, 5:], positions[:, 5:], attended=past)
    assert_close(last[:, 0], whole[:, -1], "after a cache")
    assert np.abs(whole - read(own)(tokens, positions)[0])[:, -1].max() > 0.1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda net, p, a: lmnet.control_edges(net.models[0], p, a, "zero"), "controls replace states on a network"),
        (lambda net, p, a: lmnet.control_edges(net, p, a, "shuffled"), "unknown control 'shuffled': choose one of other"),
        (lambda net, p, a: lmnet.control_edges(net, p[:1], a[:1], "other"), "the control other needs at least two items"),
        (lambda net, p, a: lmnet.control_edges(net, p, a, "zero", edges=["edges into layer 3"]), "this network has no 'edges into layer 3'"),
        (lambda net, p, a: lmnet.control_edges(net, p, a + 90, "zero"), "answers have token"),
    ],
)  # fmt: skip
def test_bad_controls_are_one_clear_line(llama, unchecked, call, says):
    refused(lambda: call(networks(llama), left_pad(ROWS), ANSWERS), says)


def test_the_published_size():
    params = jax.eval_shape(lambda: init_model(jax.random.key(0), QWEN_HALF_BILLION))
    assert lmnet.size(params) == pytest.approx(494.0e6, rel=1e-3)
    assert lmnet.size(jax.eval_shape(lambda p: lmnet.init_network(jax.random.key(0), p), params)) == pytest.approx(
        1.14e9, rel=0.01
    )
    gqa = jax.eval_shape(lambda p: lmnet.init_network(jax.random.key(0), p, edge=EdgeConfig(attention="gqa")), params)
    assert lmnet.size(gqa) == pytest.approx(1.0905e9, rel=1e-3)


def test_new_prompts_of_a_shape_compile_nothing_and_weights_are_not_copied(llama):
    network = networks(llama)
    assert network.models[0] is llama.params
    write(network, prompts(2, 8), max_new_tokens=6)
    with compiles() as programs:
        for seed in range(3):
            write(network, prompts(2, 8, seed), max_new_tokens=6)
    assert not programs


def test_bfloat16_vertices_with_float32_edges(llama):
    network = networks(llama)
    low = network.replace(models=tuple(jax.tree.map(lambda a: a.astype(jnp.bfloat16), m) for m in network.models))
    tokens = prompts(4, 30, seed=1)
    logits, want = read(low, tokens), read(network, tokens)
    assert logits.dtype == jnp.float32 and jax.tree.leaves(low.edges)[0].dtype == jnp.float32
    p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(logits)
    assert float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) < 0.02


def test_flops_equal_the_compilers_count(llama):
    config = dataclasses.replace(llama.params.config, layers=2)
    params = init_model(jax.random.key(0), config).unroll()
    network, T = lmnet.init_network(jax.random.key(0), params, (1, 2, 1)), 12
    compiled = jax.jit(lmnet.forward).lower(network, prompts(1, T)).compile()
    counted = blocks_flops(network.config, T) + T * head_flops(network.config)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.15)
    assert generation_flops(network.config, 10, 3) < 3 * counted


def test_cut_over_devices_the_logits_are_the_same(llama):
    network, mesh = networks(llama), local_mesh(4)
    placed = jax.device_put(network, fsdp_shardings(network, mesh))
    cut = [a for a in jax.tree.leaves(placed) if not a.sharding.is_fully_replicated]
    assert sum(a.size for a in cut) > 0.9 * lmnet.size(network)
    assert_close(read(placed, prompts(2, 9)), read(network, prompts(2, 9)), "4 x 2 devices")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, w: lmnet.init_network(jax.random.key(0), p, (1, 2)), "must begin and end with 1"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), p, ()), "must begin and end with 1"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), p, (1, 0, 1)), "must begin and end with 1, and hold no 0"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), p, (1, -1, 1)), "must begin and end with 1, and hold no 0"),
        (lambda p, w: EdgeConfig(residual=False), "carry nothing if they begin at zero"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), [p, w], (1, 2, 1)), "2 models for widths"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), [p, other_words(p)], (1, 1)), "vocabularies of 97, 98 tokens"),
        (lambda p, w: lmnet.init_network(jax.random.key(0), [p, w], (1, 1), edge="identity"), "identity edges cannot join widths"),
        (lambda p, w: lmnet.generate(networks_of(p), prompts(1, 1020), max_new_tokens=8), "exceed the model's 1024"),
        (lambda p, w: check_layer(networks_of(p), 1), "no layers to be split at"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(llama, wide, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(llama.params, wide.params)
    assert "\n" not in str(caught.value)


def other_words(params: Params) -> Params:
    return init_model(jax.random.key(0), dataclasses.replace(params.config, vocab=98))


def networks_of(params: Params) -> lmnet.Network:
    return lmnet.init_network(jax.random.key(0), params, (1, 1))
