"""Signed messages: a signature goes wherever the message goes, and nothing of the message can be changed beneath it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import jaxcomm as jc
from jaxcomm.sharding import local_mesh

from conftest import compiles, prompts, refused

KEY, OTHER = b"a secret of ours", b"a secret of theirs"
READS = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in (5, 3, 4)])
SITES = {
    "last": jc.Site("resid_post", 2, "last"),
    "slice": jc.Site("mlp_out", np.int64(1), slice(1, None)),
    "heads": jc.Site("z", 3, [0, -1], heads=[1, 0]),
    "by row": jc.Site("resid_post", 2, np.array([[0, 1], [2, -1], [1, 0]])),
    "embed": jc.Site("embed"),
}


def messages(params) -> dict[str, jc.Message]:
    """One of every kind."""
    told = {name: jc.send(params, READS, site).replace(note="no. 1") for name, site in SITES.items()}
    return told | {
        "cache": jc.send_cache(params, READS),
        "unrolled cache": jc.Message(jc.prefill(params.unroll(), READS)[1]),
        "text": jc.Message(text=("où? 🙂", "", "at rome"), sender="a"),
        "no rows": jc.Message(jnp.zeros((0, 4))),
        "no numbers": jc.Message(jnp.array([[jnp.nan, jnp.inf, -0.0]])),
        "float64": jc.Message(np.array([[0.1, 0.2]])),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_signature_survives_a_file_and_the_way_to_other_devices(llama, dtype, tmp_path):
    params = jax.tree.map(lambda a: a.astype(dtype), llama.params)
    placed = jc.shard(params, local_mesh())
    for name, message in messages(params).items():
        signed = message.sign(KEY)
        assert message.mac is None and len(bytes.fromhex(signed.mac)) == 32 and repr(signed).endswith(", signed)")
        signed.save(tmp_path / "message")
        for arrived in (signed, jc.Message.load(tmp_path / "message"), jc.deliver(signed, placed)):
            assert arrived.verify(KEY) is arrived, name
            assert arrived.sign(KEY).mac == signed.mac, "who signs again says the same"
            refused(lambda arrived=arrived: arrived.verify(OTHER), "signed with another key")


def test_what_was_verified_is_received_as_ever(llama):
    params = llama.params
    signed, told = jc.send(params, READS, 2).sign(KEY), jc.send_cache(params, READS).sign(KEY)
    put = lambda message: jc.forward(params, READS, edits=[jc.receive(message, 1)])
    np.testing.assert_array_equal(put(signed.verify(KEY)), put(jc.send(params, READS, 2)))
    assert jc.receive_cache(told.verify(KEY), params) is told.states


def changed(message: jc.Message) -> dict[str, jc.Message]:
    """Everything that a message says in its static fields, changed one at a time; rows swapped; arrays called otherwise."""
    found = {
        "sender": message.replace(sender="somebody"),
        "no sender": message.replace(sender=None if message.sender else "null"),
        "note": message.replace(note=message.note + " "),
        "text": message.replace(text=(*(message.text or ()), "more")),
        "no text": message.replace(text=None if message.text == () else ()),
        "site": message.replace(site=jc.Site("resid_pre", 2, "last")),
        "no site": message.replace(site=None if message.site else jc.Site("embed")),
        "valid": message.replace(valid=None if message.valid is not None else np.ones((3, 1), bool)),
    }
    if message.text:
        found["joined"] = message.replace(text=("".join(message.text),))
    if isinstance(message.states, jc.KVCache):
        k, v, at = message.states.k, message.states.v, message.states.positions
        found["v for k"] = message.replace(states=jc.KVCache(v, k, at))
        found["rows"] = message.replace(states=jc.KVCache(jnp.asarray(k)[:, ::-1], v, at))
        found["a column is empty"] = message.replace(states=jc.KVCache(k, v, at.at[0, -1].set(-1)))
        found["layers"] = message.replace(states=jc.KVCache(jnp.asarray(k)[::-1], v, at))
    elif message.states is not None and message.states.size:
        states = jnp.asarray(message.states)
        found |= {
            "rows": message.replace(states=jnp.flip(states, -1 if len(states) == 1 else 0)),
            "shape": message.replace(states=states.reshape(-1)),
            "dtype": message.replace(states=jax.lax.bitcast_convert_type(states, jnp.dtype(f"i{states.itemsize}"))),
        }
    return found


def test_nothing_that_a_message_says_can_be_changed(llama):
    for name, message in messages(llama.params).items():
        signed = message.sign(KEY)
        for what, other in changed(signed).items():
            with pytest.raises(ValueError, match="does not match: it was changed since it was signed"):
                other.verify(KEY)
                pytest.fail(f"{name}: {what}")
        assert signed.anonymous().mac is None, "another message"


def test_every_word_of_a_site_is_signed():
    base = dict(name="z", layer=3, positions=(0, -1), heads=(1, 0))
    signed = jc.Message(jnp.ones((1, 2, 2, 3)), site=jc.Site(**base)).sign(KEY)
    others = dict(name="q", layer=2, positions=[(-1, 0), "last", -1, slice(0, -1), slice(0, -1, 1), slice(0, None)])
    others |= dict(heads=[(0, 1), 1, None], positions=[*others["positions"], np.array([[0, -1]])])
    seen = {signed.mac}
    for field, values in others.items():
        for value in values if isinstance(values, list) else [values]:
            message = signed.replace(site=jc.Site(**base | {field: value}))
            refused(lambda message=message: message.verify(KEY), "does not match")
            seen.add(message.sign(KEY).mac)
    assert len(seen) == 13, "no two sites are signed alike"


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """Signed messages as bytes of files, and where their header ends."""
    path, found = tmp_path_factory.mktemp("signed") / "message", {}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), llama.params)
    for name, message in (messages(llama.params) | {"bfloat16 cache": jc.send_cache(half, READS)}).items():
        message.sign(KEY).save(path)
        whole = path.read_bytes()
        found[name] = whole, 8 + int.from_bytes(whole[:8], "little")
    return path, found


@settings(max_examples=300)
@given(st.data())
def test_any_changed_bit_of_a_file_is_caught(files, data):
    """One line says so, whatever it hits; or the bit means nothing, and it is the same message."""
    path, found = files
    whole, header = found[data.draw(st.sampled_from(sorted(found)))]
    part = st.integers(0, header - 1) if data.draw(st.booleans()) else st.integers(header, len(whole) - 1)
    at = data.draw(part if len(whole) > header else st.integers(0, header - 1))
    other = bytearray(whole)
    other[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    sent = jc.Message.load(path)
    path.write_bytes(other)
    try:
        arrived = jc.Message.load(path).verify(KEY)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        same = lambda a, b: (
            a.dtype == b.dtype and np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        )
        assert repr(arrived) == repr(sent) and (arrived.note, arrived.mac) == (sent.note, sent.mac)
        assert jax.tree.all(jax.tree.map(same, arrived, sent))


def test_text_and_arrays_cannot_pass_for_each_other():
    """Every part goes in with its length."""
    base = dict(sender="a", note="b", text=("c", "d"))
    others = [
        dict(sender="ab", note=""),
        dict(text=("cd",)),
        dict(text=('c", "d',)),
        dict(text=("c", "d", "")),
        dict(note='b", "x": "'),
    ]
    made = [
        jc.Message(**base),
        *(jc.Message(**base | other) for other in others),
        jc.Message(note="b", text=("c", "d")),
    ]
    shapes = [jc.Message(jnp.zeros(shape)) for shape in ((2, 3), (3, 2), (6, 1), (0, 6), (6, 0), (0, 1))]
    assert len({message.sign(KEY).mac for message in made + shapes}) == len(made) + len(shapes)


def test_files_of_before_signatures_load_and_are_not_signed(llama, tmp_path):
    path = tmp_path / "message"
    jc.send(llama.params, READS, 2).save(path)
    with safe_open(path, "numpy") as file:
        header, states = file.metadata(), file.get_tensor("states")
    about = json.loads(header["about"])
    assert about.pop("mac") is None
    safetensors.numpy.save_file({"states": states}, path, metadata={**header, "about": json.dumps(about)})
    old = jc.Message.load(path)
    np.testing.assert_array_equal(old.states, jc.send(llama.params, READS, 2).states)
    refused(lambda: old.verify(KEY), "this message is not signed: ask the sender for message.sign(key)")
    for foreign in (3, ["a"], "\ud800é", "", "ä" * 64):
        about |= {"mac": foreign}
        safetensors.numpy.save_file({"states": states}, path, metadata={**header, "about": json.dumps(about)})
        refused(lambda: jc.Message.load(path).verify(KEY), "does not match")


def test_without_a_key_or_values_there_is_no_signature(llama):
    message = jc.send(llama.params, READS, 2).sign(KEY)
    for call in (message.sign, message.verify):
        refused(lambda call=call: call(b""), "the key is empty: share a secret, such as secrets.token_bytes(32)")
    says = "a message has no values yet under jit, grad or vmap: sign and verify it outside of them"
    total = lambda states: jc.Message(states).sign(KEY).states.sum()
    for transform in (jax.jit, jax.grad, jax.vmap):
        refused(lambda transform=transform: transform(total)(jnp.ones((2, 3))), says)
    refused(lambda: jax.jit(lambda: message.verify(KEY).states)(), says)


def test_a_signature_compiles_nothing_again(llama):
    put = lambda note: jc.forward(
        llama.params, READS, edits=[jc.receive(sent.replace(note=note).sign(KEY).verify(KEY), 1)]
    )
    sent = jc.send(llama.params, READS, 2)
    put("first")
    with compiles() as seen:
        put("second")
    assert not seen
