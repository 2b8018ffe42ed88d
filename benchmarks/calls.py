"""What a call of a public function costs beside the caller's own `jax.jit` of it, from the second call on.

    python benchmarks/calls.py [--rounds 7]          two CPU threads, float32, about three minutes

Every call has another prompt of the same bucket. The caller's program has k and j built in, which ours takes as arguments.
Then: what looking at the values costs alone, and how many programs other prompts and every (k, j) compile.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import platform
import statistics
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

import jaxcomm as jc
from jaxcomm.compiled import check_layer, check_tokens
from jaxcomm.converters import load_agent
from jaxcomm.evals.pair import folder
from jaxcomm.model import run_blocks
from jaxcomm.prompts import Prompts

SHAPE = jc.ModelConfig(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ff=1536, max_positions=2048)
"""SmolLM2-135M's."""
NEW, K, J = 8, 5, 2


def calls(params: jc.Params):
    """name -> (ours, the caller's own), each a function of tokens and mask."""
    message = jc.send(params, np.ones((1, 4), np.int32), K).anonymous()
    words, cache = jc.prefill(params, np.ones((1, 32), np.int32))
    texts = np.ones((1, 4, 3), np.int32)
    functions = {
        "forward": lambda p, t, m, *a: jc.forward(p, Prompts(t, m)),
        "hidden_states": lambda p, t, m, *a: jc.hidden_states(p, Prompts(t, m), last=True),
        "prefix": lambda p, t, m, *a: jc.prefix(p, Prompts(t, m), K),
        "suffix": lambda p, t, m, h, *a: jc.suffix(p, h, K, mask=m),
        "send": lambda p, t, m, *a: jc.send(p, Prompts(t, m), K),
        "edits": lambda p, t, m, h, x, *a: jc.generate(p, Prompts(t, m), edits=[jc.receive(x, J)], max_new_tokens=NEW),
        "run_with_cache": lambda p, t, m, *a: jc.run_with_cache(p, Prompts(t, m), sites="z", layers=(1, 2)),
        "communicate": lambda p, t, m, *a: jc.communicate(
            p, p, Prompts(t, m), Prompts(t, m), k=K, j=J, max_new_tokens=NEW
        ),
        "communicate_logits": lambda p, t, m, *a: jc.communicate_logits(
            p, p, Prompts(t, m), Prompts(t, m), t[:, -4:], k=K, j=J
        ),
        "generate": lambda p, t, m, *a: jc.generate(p, Prompts(t, m), max_new_tokens=NEW),
        "score": lambda p, t, m, h, x, words, cache, texts: jc.score(p, words, cache, texts),
    }
    more = jc.prefix(params, np.ones((1, 32), np.int32), K), message, words, cache, texts
    for name, fn in functions.items():
        own = jax.jit(fn)
        yield name, lambda t, m, fn=fn: fn(params, t, m, *more), lambda t, m, own=own: own(params, t, m, *more)


@contextlib.contextmanager
def compiled():
    """A list that grows by one with every program XLA compiles."""
    seen, open_ = [], [True]
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: seen.append(seconds) if name == event and open_[0] else None
    )
    yield seen
    open_[0] = False


def look(params: jc.Params, tokens: np.ndarray, mask: np.ndarray) -> None:
    check_tokens(params, Prompts(tokens, mask))
    check_layer(params, K)


def bare(params: jc.Params, prompts: Prompts) -> jax.Array:
    """`forward` of a Llama that trusts its input."""
    positions = jnp.where(prompts.mask, jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, -1)
    return params.logits(run_blocks(params, params.embed[prompts.tokens], positions)[0])


def masked(fn, params: jc.Params, tokens: np.ndarray, mask: np.ndarray):
    return fn(params, Prompts(tokens, mask))


def seconds(fn, prompts) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        jax.block_until_ready(fn(*prompt))
    return (time.perf_counter() - start) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__} on {device.platform} ({platform.machine()}), {jax.local_device_count()} device, float32"
    )
    b = load_agent(folder("b"), "float32")
    models = {
        "embedded pair, b": (b.params, 30),
        "30 layers, width 576": (jc.init_params(jax.random.key(0), SHAPE), 2),
    }
    for title, (params, repeats) in models.items():
        make = np.random.default_rng(0)
        lengths = make.integers(8, 33, 4 * repeats)
        padded = [jc.left_pad([make.integers(1, params.config.vocab, n)], 32) for n in lengths]
        prompts = [(p.tokens, p.mask) for p in padded]
        print(f"\n{title}: one prompt of 8 to 32 tokens, {NEW} new ones; medians of {rounds} rounds in turns")
        print(f"{'':20} {'own jit, ms':>12} {'jaxcomm, ms':>12} {'ratio':>6}")
        for name, ours, own in calls(params):
            seconds(ours, prompts[:1]), seconds(own, prompts[:1])
            pairs = [(seconds(own, prompts), seconds(ours, prompts)) for _ in range(rounds)]
            ratio = statistics.median(y / x for x, y in pairs)
            x, y = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
            print(f"{name:20} {x:12.2f} {y:12.2f} {ratio:6.2f}")
        with compiled() as programs:
            for (tokens, mask), (k, j) in zip(prompts, itertools.product(range(3), range(4)), strict=False):
                jc.communicate(
                    params, params, Prompts(tokens, mask), Prompts(tokens, mask), k=k, j=j, max_new_tokens=NEW
                )
        print(f"programs compiled for other prompts, k and j: {len(programs)}")
        with_nan, without = jax.jit(jc.forward), jax.jit(bare)
        guarded, plain = (functools.partial(masked, fn, params) for fn in (with_nan, without))
        seconds(guarded, prompts[:1]), seconds(plain, prompts[:1])
        pairs = [(seconds(plain, prompts), seconds(guarded, prompts)) for _ in range(rounds)]
        print(f"NaN for invalid values, in forward: {statistics.median(y / x for x, y in pairs):.2f} times one without")
        print(
            f"looking at the values of a call: {seconds(functools.partial(look, params), prompts * 20) * 1e6:.0f} microseconds"
        )


if __name__ == "__main__":
    main()
