"""A real model beside transformers on the same .gguf file: loading, the first token of a second process, decoding, memory, a sweep.

    make bench-real, or: python benchmarks/real.py [--model real:smollm2 --threads 2 --rounds 5]

Both sides do what a user does: load the model and its tokenizer out of the file, read a prompt, write 64 tokens, greedily; no
compilation of the caller's own. They live in processes of their own and take turns. The first process of ours fills the cache
of compiled programs, as a user's first does; it is a new, empty one. The sweep scores the answers of 40 games of Countries, put through the
chat template, at 10 x 10 layers, one after another with forward hooks on transformers (A's states cached, all games in one batch, one
pass per cell; three columns of ten are run), all at once here. Memory is a process' high-water mark after loading,
less what it held before (imports done). transformers' side has torch, ours an environment without it (as in make bench).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROMPT = (
    "The Louvre is the most visited museum in the world. It stands on the right bank of the Seine in Paris, and its "
    "collection reaches from the oldest works of Egypt to the middle of the nineteenth century. In the morning"
)
NEW = 64
GAMES, GRID, COLUMNS = 40, 10, 3


def peak() -> int:
    """This process' high-water mark, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held() -> int:
    """What it holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def worker(side: str, file: str, threads: int) -> None:
    """Prints one JSON line when it has loaded and said its first token; then answers lines of stdin with seconds and what was found: of a
    batch size, the NEW tokens that one call writes; of a game, the log-probabilities of its answers."""
    begin = time.perf_counter()
    if side == "transformers":
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        imported, before = time.perf_counter(), held()
        where = dict(pretrained_model_name_or_path=os.path.dirname(file), gguf_file=os.path.basename(file))
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        loaded, high = time.perf_counter(), peak()

        def write(batch: int, new: int) -> np.ndarray:
            ids = torch.tensor([tokenizer.encode(PROMPT)] * batch)
            how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
            return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.shape[1] :].numpy()

        def sweep(game: dict) -> list:
            """Log-probabilities [ks, columns, games] of the answers, with the state of A's layer k in place of B's after j."""
            to = lambda name: torch.tensor(game[name])
            (ta, ma), (tb, mb), answers, layers = (to("ta"), to("ma")), (to("tb"), to("mb")), to("answers"), game["ks"]
            asked, sent, state = answers >= 0, {}, {}
            ids = torch.cat([tb, answers.clamp(min=0)[:, :-1]], 1)
            mask = torch.cat([mb, torch.ones_like(answers[:, :-1])], 1)
            at = lambda mask: (mask.cumsum(1) - 1).clamp(min=0)
            blocks = model.model.layers
            keep = lambda k: (
                lambda module, inputs, out: sent.__setitem__(
                    k, (out[0] if isinstance(out, tuple) else out)[:, -1].clone()
                )
            )

            def replace(module, inputs, out):
                (out[0] if isinstance(out, tuple) else out)[:, tb.shape[1] - 1] = state["a"]

            found = []
            with torch.no_grad():
                hooks = [blocks[k - 1].register_forward_hook(keep(k)) for k in layers]
                model.model(ta, attention_mask=ma, position_ids=at(ma), use_cache=False)
                for hook in hooks:
                    hook.remove()
                for j in game["columns"]:
                    hook = blocks[j - 1].register_forward_hook(replace)
                    for k in layers:
                        state["a"] = sent[k]
                        how = dict(
                            attention_mask=mask, position_ids=at(mask), logits_to_keep=answers.shape[1], use_cache=False
                        )
                        logprobs = (
                            model(ids, **how).logits.log_softmax(-1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
                        )
                        found.append((logprobs * asked).sum(-1).tolist())
                    hook.remove()
            return found
    else:
        from jaxcomm.converters import load_agent
        from jaxcomm.decoding import generate
        from jaxcomm.evals import programs
        from jaxcomm.prompts import Prompts

        programs.keep()
        imported, before = time.perf_counter(), held()
        agent = load_agent(file)
        loaded, high = time.perf_counter(), peak()

        def write(batch: int, new: int) -> np.ndarray:
            return np.asarray(generate(agent.params, agent.tokenize([PROMPT] * batch), max_new_tokens=new).tokens)

        def sweep(game: dict) -> list:
            """The same, of all columns; a list for each k."""
            from jaxcomm.layer_sweep import sweep_answers

            params = agent.params.stack()  # as jaxcomm sweep has it
            to = lambda name, kind: np.array(game[name], kind)
            out = sweep_answers(
                params, params, Prompts(to("ta", np.int32), to("ma", bool)), Prompts(to("tb", np.int32), to("mb", bool)), to("answers", np.int32), ks=game["ks"], js=game["ks"],
            )  # fmt: skip
            return np.asarray(out.logprobs)[0].sum(-1).tolist()

    write(1, 1)
    first = time.perf_counter()
    told = {"imports": imported - begin, "loading": loaded - imported, "first": first - begin, "memory": high - before}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        start, asked = time.perf_counter(), json.loads(line)
        found = write(asked, NEW).tolist() if isinstance(asked, int) else sweep(asked)
        print(json.dumps([time.perf_counter() - start, found]), flush=True)


class Side:
    """A process that loads, then writes when it is asked."""

    def __init__(self, side: str, python: str, file: str, threads: int, home: str):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": home, "HF_HUB_OFFLINE": "1"}
        environment.pop("JAXCOMM_PROGRAMS", None)
        self.process = subprocess.Popen(
            [python, __file__, "--worker", side, file, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.told = json.loads(self.process.stdout.readline())

    def ask(self, asked) -> tuple[float, list]:
        self.process.stdin.write(f"{json.dumps(asked)}\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="real:smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="processes of each side")
    parser.add_argument("--python", default=sys.executable, help="of our side's environment")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.threads)

    from jaxcomm.converters import real
    from jaxcomm.converters.agents import architecture
    from jaxcomm.flops import block_weights

    file = str(real.find(args.model) if real.is_real(args.model) else Path(args.model).absolute())
    config = architecture(file)
    weights = 4 * (config.layers * block_weights(config) + config.vocab * config.width * (1 if config.tied_head else 2))
    print(
        f"{args.model}: {config.layers} layers, width {config.width}, vocabulary {config.vocab}; {weights / 2**20:.0f} MiB of float32 weights; {args.threads} threads"
    )
    with tempfile.TemporaryDirectory() as home:
        start = lambda side: Side(
            side, sys.executable if side == "transformers" else args.python, file, args.threads, home
        )
        begun = {"jaxcomm": [], "transformers": []}
        cold = start("jaxcomm")
        cold.close()
        for n in range(args.starts):
            sides = {side: start(side) for side in begun}
            for side, process in sides.items():
                begun[side].append(process.told)
                if n < args.starts - 1:
                    process.close()
        middle = lambda side, what: float(np.median([told[what] for told in begun[side]]))
        ours, theirs = (
            {what: middle(side, what) for what in ("imports", "loading", "first", "memory")} for side in begun
        )
        print(
            f"loading model and tokenizer: {ours['loading']:.2f} s, transformers {theirs['loading']:.2f} s: {ours['loading'] / theirs['loading']:.2f} of its time (asked 0.50)"
        )
        print(
            f"first token of a second process, from its start: {ours['first']:.2f} s, transformers {theirs['first']:.2f} s: {ours['first'] / theirs['first']:.2f} (asked 1.00); "
            f"of a first one, which compiles, {cold.told['first']:.2f} s"
        )
        print(
            f"memory that loading takes: {ours['memory'] / weights:.2f} times the weights (asked 1.20), transformers {theirs['memory'] / weights:.2f}"
        )
        for batch, asked in ((1, 1.8), (8, 1.3)):
            times = {side: [] for side in sides}
            said = {side: process.ask(batch)[1] for side, process in sides.items()}  # the first call compiles
            for _ in range(args.rounds):
                for side, process in sides.items():
                    times[side].append(process.ask(batch)[0])
            speed = {side: batch * NEW / float(np.median(own)) for side, own in times.items()}
            same = np.mean(np.array(said["jaxcomm"]) == np.array(said["transformers"]))
            print(
                f"{NEW} tokens at batch {batch}: {speed['jaxcomm']:.1f} tokens/s, transformers {speed['transformers']:.1f}: {speed['jaxcomm'] / speed['transformers']:.2f} times "
                f"(asked {asked}); {same:.1%} of the tokens are the same"
            )
        beside_hooks(sides, file, config)
        for process in sides.values():
            process.close()


def beside_hooks(sides, file: str, config) -> None:
    """The sweep, its first call and its second, beside the loop."""

    from sweep import rate

    from jaxcomm.converters import load_agent
    from jaxcomm.evals.games import Wording, draw
    from jaxcomm.flops import blocks_flops, head_flops

    agent, game, wording = load_agent(file, chat=True), draw("countries", 0, GAMES), Wording()
    prompts = wording.prompts_b(game, agent)
    answers = agent.spell(prompts, [item.answer for item in game.items])
    both = [agent.tokenize(x) for x in (wording.prompts_a(game, agent), prompts)]
    (ta, ma), (tb, mb) = ((p.tokens, p.mask) for p in both)
    layers = [round(i * config.layers / GRID) for i in range(1, GRID + 1)]
    columns = [layers[i] for i in np.linspace(0, GRID - 1, COLUMNS).round().astype(int)]
    asked = {"ks": layers, "columns": columns} | {
        name: np.asarray(x).astype(int).tolist()
        for name, x in (("ta", ta), ("ma", ma), ("tb", tb), ("mb", mb), ("answers", answers))
    }
    loop, theirs = sides["transformers"].ask(asked)
    first, ours = sides["jaxcomm"].ask(asked)
    again = min(sides["jaxcomm"].ask(asked)[0] for _ in range(2))
    loop *= GRID / COLUMNS
    at = [layers.index(j) for j in columns]
    theirs = np.array(theirs).reshape(COLUMNS, GRID, -1).swapaxes(0, 1)
    apart = np.abs(np.array(ours)[:, at] - theirs).max()
    product, _ = rate("float32")
    lengths = (answers >= 0).sum(axis=1)
    reading = 2 * sum(blocks_flops(config, int(n)) for n in (*ma.sum(axis=1), *mb.sum(axis=1))) / 2
    above = sum(config.layers - j for j in layers) / GRID
    cells = sum(
        GRID**2 * (blocks_flops(config, int(t), context=int(p) - 1, blocks=1) * above + t * head_flops(config))
        for t, p in zip(lengths, mb.sum(axis=1), strict=True)
    )
    floor = (reading + cells) / product
    print(
        f"sweep, {GAMES} games, prompts of {int(mb.sum(axis=1).max())} tokens, answers of {lengths.min()} to {lengths.max()}, {GRID} x {GRID} cells: {again:.1f} s, its first call, "
        f"compiling included, {first:.1f} s; hook loop {loop:.0f} s: {loop / again:.1f} times, {loop / first:.1f} with compiling (asked 20); "
        f"floor {floor:.1f} s at {product / 1e9:.0f} GFLOP/s: {floor / again:.0%} of it reached (asked 75 %); log-probabilities within {apart:.1e}"
    )


if __name__ == "__main__":
    main()
