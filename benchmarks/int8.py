"""What fewer bits cost: KL per token from float32, of bfloat16 weights and of int8 weights, and how often the argmax is the same.

    python benchmarks/int8.py [CHECKPOINT ...]      (default: the embedded pair, on statements of the games)

The reference is the checkpoint in float32; divergences are means over all tokens but the first of each text.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from jaxcomm.evals.agents import load_agents
from jaxcomm.evals.sentences import sentences
from jaxcomm.int8 import quantise
from jaxcomm.reading import forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["pair:a", "pair:b"])
    parser.add_argument("--text", default="statements", help="a file with a text per line")
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    read = jax.jit(forward)
    for name in args.checkpoints:
        (agent,) = load_agents(name)
        texts = sentences("statements:countries" if args.text == "statements" else args.text, args.n, seed=0)
        prompts = agent.tokenize(texts)
        mask = prompts.mask
        exact = jax.nn.log_softmax(read(agent.params, prompts))
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), agent.params)
        kinds = {"bfloat16": half, "int8, float32": quantise(agent.params), "int8, bfloat16": quantise(half)}
        told = mask[:, 1:] & mask[:, :-1]
        size = lambda p: sum(a.nbytes for a in jax.tree.leaves(p)) / 2**20
        print(f"{name}: {told.sum()} tokens; float32 takes {size(agent.params):.1f} MiB")
        for kind, params in kinds.items():
            logp = jax.nn.log_softmax(read(params, prompts))
            kl = jnp.sum(jnp.exp(exact) * (exact - logp), axis=-1)[:, 1:][told]
            same = jnp.mean((jnp.argmax(exact, -1) == jnp.argmax(logp, -1))[:, 1:][told])
            print(
                f"  {kind:16} {size(params):6.1f} MiB  KL {kl.mean():.2e} nats a token, largest {kl.max():.2e}, same argmax {same:.2%}"
            )


if __name__ == "__main__":
    main()
