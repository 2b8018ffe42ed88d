"""Breaks central lines one at a time, and says which test catches each: make mutants.

Not a test: it edits the checkout (and puts every line back), so nothing may be uncommitted.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = (
    # file, line, what it becomes, where a test has to fail
    ("jaxcomm/model.py", "fori_loop(start, stop, lambda", "fori_loop(start + 1, stop, lambda", "test_model"),
    ("jaxcomm/language_model.py", "jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)", "jnp.cumsum(mask, axis=1, dtype=jnp.int32), -1)", "test_model"),
    ("jaxcomm/edits.py", "jnp.equal(wanted, layer)", "jnp.equal(wanted + 1, layer)", "test_communicate"),
    ("jaxcomm/attention.py", "(distance >= 0)", "(distance > 0)", "test_parity"),
    ("jaxcomm/attention.py", "state.out * before +", "state.out +", "test_attention"),
    ("jaxcomm/attention.py", "- jnp.sum(weights * mean)", "", "test_attention"),
    ("jaxcomm/attention.py", "- jnp.max(keys, axis=-1)[None] < window", "- earliest(keys)[None] < window", "test_attention"),
    ("jaxcomm/layer_sweep/patching.py", "np.take_along_axis(rows[:, None], whole[1], axis=2)", "whole[1]", "test_patching"),
    ("jaxcomm/layers.py", "low * cos - high * sin", "low * cos + high * sin", "test_parity"),
    ("jaxcomm/edits.py", "a[..., a.shape[-1] - d :]", "a[..., :d]", "test_communicate"),
    ("jaxcomm/decoding.py", "jax.vmap(jax.random.fold_in, (0, None))(self.keys, t)", "self.keys", "test_model"),
    ("jaxcomm/layer_sweep/programs.py", "jnp.where((at == i)[..., None], edit, h)", "jnp.where((at == i + 1)[..., None], edit, h)", "test_sweep"),
    ("jaxcomm/ridge.py", "sums.aa + jnp.diag(_penalty(sums.aa, ridge, intercept))", "sums.aa", "test_mapping"),
    ("jaxcomm/training.py", "documents[:, 1:] != documents[:, :-1]", "documents[:, 1:] < documents[:, :-1]", "test_lmnet_training"),
    ("jaxcomm/prompts.py", "not real.size or real[:, -1].all()", "not real.size or real[:, 0].all()", "test_compiled"),
    ("converters/weights.py", "begin = sum(self.parts(c)[: self.part])", "begin = 0", "test_parity"),
    ("jaxcomm/protocols/answers.py", "given.count(a) == most", "given.count(a) >= 1", "test_answers"),
    ("evals/scores.py", "np.asarray(hits, float) - np.asarray(others, float)\n    if len(x) < 2", "np.asarray(hits, float) + np.asarray(others, float)\n    if len(x) < 2", "test_sweeps"),
    ("jaxcomm/cipher.py", "jnp.where(mixed, p, certain)", "p", "test_debate"),
    ("jaxcomm/lenses.py", "1 + jnp.sum(every > own", "jnp.sum(every > own", "test_lenses"),
    ("jaxcomm/lmnet/controls.py", "_columns(prompts, given)", "_columns(prompts, answers)", "test_lmnet"),
    ("jaxcomm/controls.py", "np.roll(circle, -step)", "np.roll(circle, -1)", "test_controls"),
    ("jaxcomm/controls.py", "(total - wide * there) / jnp.maximum(count - there, 1)", "total / jnp.maximum(count, 1)", "test_controls"),
    ("jaxcomm/controls.py", "unit(states - RATE * norms", "unit(states + RATE * norms", "test_controls"),
    ("evals/effects.py", "effect(other, alone), effect(own, other))", "effect(own, other), effect(other, alone))", "test_effects"),
    ("evals/effects.py", "np.arange(len(ps), 0, -1)", "len(ps)", "test_effects"),
    ("evals/sweeps/parts.py", "[part.questions] if part.message == \"other\"", "[part.questions] if part.message == \"none\"", "test_sweeps"),
    ("jaxcomm/bridges.py", "x[:, -count:]", "x[:, :count]", "test_bridges"),
    ("jaxcomm/bridges.py", "jnp.where(after, -1, places)", "places", "test_bridges"),
    ("jaxcomm/bridges.py", "2 * longest * documents", "0 * documents", "test_bridges"),
    ("jaxcomm/bridges.py", "jax.random.fold_in(jax.random.key(bridge.seed), step[0])", "jax.random.key(bridge.seed)", "test_bridges"),
    ("jaxcomm/protocols/bridges.py", "heads = b.single, [row[:-1] for row in rows]", "heads = b.single, rows", "test_bridges"),
    ("evals/bridges/compare.py", "row[\"hits\"][0][:n]", "row[\"hits\"][0]", "test_bridge_commands"),
    ("jaxcomm/lora.py", "scale * factor", "factor", "test_lmnet_training"),
    ("evals/networks/texts.py", "[0.0] * len(asked) + [1.0] * len(answered)", "[1.0] * (len(asked) + len(answered))", "test_lmnet_training"),
    ("evals/sweeps/halves.py", "found.best(g, chosen_on)", "found.best(g, reported)", "test_sweeps"),
    ("jaxcomm/messages.py", "repr(array.shape).encode(), np", "np", "test_signing"),
    ("evals/monitors.py", "_unit(_unit(wide).sum(axis=1))", "wide.sum(axis=1)", "test_monitors"),
    ("evals/injections.py", "range(n // 2), range(n // 2, n)", "range(n // 2), range(n // 2 - 1, n)", "test_monitors"),
    ("evals/scores.py", "n - 1 - int(alarms * n)", "n - 2 - int(alarms * n)", "test_monitors"),
    ("jaxcomm/prefixes.py", "rows_for(jnp.sum(real, axis=1, dtype=jnp.int32), rows) - 1, 0)", "rows_for(jnp.sum(real, axis=1, dtype=jnp.int32), rows), 0)", "test_prefixes"),
    ("jaxcomm/prefixes.py", "(n + 0.5) * layers / count - 0.5", "n * layers / count", "test_prefixes"),
    ("jaxcomm/prefixes.py", "tuple(x / scale[n] for x in", "tuple(x for x in", "test_prefixes"),
    ("jaxcomm/latents.py", "positions[:, -1:] + 1 + m", "positions[:, -1:] + m", "test_latents"),
    ("jaxcomm/protocols/state_deltas.py", "moved = jnp.where(jnp.asarray(both)[..., None, None], states[:, 1:] - states[:, :-1], 0)", "moved = jnp.where(jnp.asarray(both)[..., None, None], states[:, 1:], 0)", "test_channels"),
    ("jaxcomm/protocols/prefixes.py", "move(cache, params.config, ahead)", "cache", "test_channels"),
    ("jaxcomm/protocols/state_deltas.py", "end - min(len(ids[i]), len(ids[o])) : end", "end - len(ids[i]) : end", "test_channel_commands"),
    ("jaxcomm/prefixes.py", "jnp.arange(columns) < columns - count", "jnp.arange(columns) <= columns - count", "test_channel_commands"),
    ("jaxcomm/attention.py", "made.append(jnp.where(seen[:, None], own, 0))", "made.append(own)", "test_bridges"),
    ("evals/selections.py", "cache.take(order)", "cache", "test_channel_commands"),
    ("jaxcomm/kv_mapping.py", "cos / scale**2, -sin / scale**2", "cos, -sin", "test_kv_mapping"),
    ("jaxcomm/kv_mapping.py", "(texts + texts // HELD_OUT) % stride", "texts % stride", "test_kv_mapping"),
    ("jaxcomm/kv_mapping.py", "jnp.where(there[:, None], x - x0, 0)", "jnp.where(there[:, None], x, 0)", "test_kv_mapping"),
    ("jaxcomm/kv_mapping.py", "_turn(b, keys, places, layers, back=False)", "_turn(b, keys, cache.positions, layers, back=False)", "test_kv_mapping"),
    ("jaxcomm/kv_mapping.py", "return jnp.concatenate([x[: len(question)]] * 2), found", "return x, found", "test_kv_mapping"),
    ("jaxcomm/ridge.py", "* jnp.mean(centred)).at[-1].set(0)", "* jnp.mean(centred))", "test_kv_mapping"),
    ("jaxcomm/alignment.py", "np.maximum(found, same)", "same", "test_kv_mapping"),
    ("jaxcomm/attention.py", "total=empty(1.0, 1)", "total=empty(0.0, 1)", "test_attention"),
    ("jaxcomm/attention.py", "sinking = -jnp.sum(", "sinking = jnp.sum(", "test_attention"),
    ("jaxcomm/layers.py", "return up + 1 if config.up_plus_one else up", "return up", "test_parity"),
    ("converters/tensors.py", "[blocks & 15, blocks >> 4]", "[blocks >> 4, blocks & 15]", "test_families"),
    ("jaxcomm/layers.py", "y = unit(y, c.norm_eps)", "y = y + 0", "test_parity"),
    ("jaxcomm/layers.py", "frequency[int(rope.share * head_dim // 2) :] = 0", "frequency[int(rope.share * head_dim) :] = 0", "test_parity"),
    ("jaxcomm/flops.py", "(2 - c.keys_as_values)", "2", "test_unlike_layers"),
    ("jaxcomm/cache.py", "self.past[-1].states[layer]", "self.past[0].states[layer]", "test_linear_attention"),
    ("jaxcomm/cache.py", "jnp.any((places >= 0) & (places < first), axis=-1)", "jnp.any(places >= 0, axis=-1)", "test_linear_attention"),
    ("jaxcomm/communication.py", "(*past, earlier))", "past)", "test_linear_attention"),
    ("jaxcomm/layers.py", "jnp.where(real, decay, 0), jnp", "decay, jnp", "test_linear_attention"),
    ("jaxcomm/linear_attention.py", "[None, :, None] - padding", "[None, :, None]", "test_linear_attention"),
    ("jaxcomm/linear_attention.py", "between[..., -1, :, None]", "jnp.ones_like(since)", "test_linear_attention"),
    ("converters/weights.py", "self.parts, c.head_dim, *tensor.shape[1:])[:, self.part]", "self.parts, c.head_dim, *tensor.shape[1:])[:, 0]", "test_parity"),
)  # fmt: skip


def main() -> None:
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    if changed:
        sys.exit(f"commit first, or these would be lost:\n{changed}")
    survived = 0
    for file, old, new, test in MUTANTS:
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            sys.exit(f"{file} has {text.count(old)} times {old!r}: bring MUTANTS up to date")
        path.write_text(text.replace(old, new), encoding="utf-8")
        try:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "--no-header", f"tests/{test}.py"]
            said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        finally:
            path.write_text(text, encoding="utf-8")
        caught = [
            line.split(" - ")[0].split("::")[-1] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        survived += not caught
        print(f"{file}: {old}\n    -> {new}\n    {f'{test}::{caught[0]}' if caught else 'NOT CAUGHT'}", flush=True)
    sys.exit(f"{survived} were not caught" if survived else 0)


if __name__ == "__main__":
    main()
