import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import random_models, weights
from experiments.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make(out, *, name="tiny", **block):
    return weights.materialise(name=name, block=block, packages={}, out_dir=out)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_random_weights_make_the_same_bytes_twice(tmp_path, architecture):
    base = make(tmp_path / "here" / "a", source=f"random:{architecture}", seed=3)
    again = make(tmp_path / "b", source=f"random:{architecture}", seed=3)
    assert base == again and contents(tmp_path / "here" / "a") == contents(tmp_path / "b")
    assert base == json.loads((tmp_path / "b" / "base.json").read_text())
    assert base["dtype"] == "float32" and base["not_a_result"] is True
    assert make(tmp_path / "c", source=f"random:{architecture}", seed=4)["sha256"] != base["sha256"]
    everything = b"".join(contents(tmp_path / "b").values())
    assert str(tmp_path).encode() not in everything and str(ROOT).encode() not in everything
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_written_is_what_is_loaded(tmp_path):
    make(tmp_path / "a", source="random:llama", seed=3, config={"num_hidden_layers": 1})
    model = weights.load_model(tmp_path / "a", dtype="auto")
    expected = random_models.build("llama", seed=3, num_hidden_layers=1)
    assert not model.training
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert weights.load_model(tmp_path / "a", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert weights.load_tokenizer(tmp_path / "a")("hé")["input_ids"] == list("hé".encode())


def test_a_folder_is_taken_over_in_the_dtype_asked_for(tmp_path):
    make(tmp_path / "a", source="random:gptj", seed=3)
    kept = make(tmp_path / "b", source=f"path:{tmp_path / 'a'}")
    rounded = make(tmp_path / "c", source=f"path:{tmp_path / 'a'}", dtype="bfloat16")
    assert kept["sha256"] == weights.tensor_sha256(tmp_path / "a") and kept["dtype"] == "float32"
    assert rounded["dtype"] == "bfloat16" and rounded["parameters"] == kept["parameters"]
    a, c = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert all(torch.equal(a[name].bfloat16(), c[name]) for name in a)


def test_the_hash_of_weights_does_not_depend_on_their_files(tmp_path):
    model = random_models.build("gptj", seed=0)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights.tensor_sha256(tmp_path / "one") == weights.tensor_sha256(tmp_path / "many")
    with torch.no_grad():
        model.lm_head.bias[3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert weights.tensor_sha256(tmp_path / "other") != weights.tensor_sha256(tmp_path / "one")


def as_bin(folder, architecture, **extra):
    """A model folder as old versions of transformers wrote it: pickled tensors, with buffers among them."""
    model = random_models.build(architecture, seed=5)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rotary": True, "scale_attn_weights": True, "summary_type": "cls_index", "tokenizer_class": "GPT2Tokenizer",
               "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}}}
    (folder / "config.json").write_text(json.dumps(config))
    random_models.byte_tokenizer().save_pretrained(folder)
    torch.save(dict(model.state_dict()) | extra, folder / "pytorch_model.bin")
    return model, hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("architecture", ["gptj", "llama"])
def test_a_bin_is_converted_when_its_checksum_is_stated(tmp_path, architecture):
    model, sha = as_bin(tmp_path / "old", architecture, **{"transformer.h.0.attn.bias": torch.ones(1, dtype=torch.uint8)})
    made = make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=sha)
    loaded = weights.load_model(tmp_path / "new", dtype="auto")
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert made["dtype"] == "float32" and not list((tmp_path / "new").glob("*.bin"))
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_bin_is_refused_without_its_checksum_or_with_another(tmp_path):
    as_bin(tmp_path / "old", "gptj")
    with pytest.raises(UserError, match="model 'tiny': .*holds no safetensors.*bin_sha256"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}")
    with pytest.raises(UserError, match="checksum of pytorch_model.bin differs"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256="0" * 64)
    assert not (tmp_path / "new").exists()


def test_a_bin_that_is_a_program_is_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    _, sha = as_bin(tmp_path / "old", "gptj", program=Program())
    with pytest.raises(UserError, match="holds more than tensors"):
        make(tmp_path / "new", source=f"path:{tmp_path / 'old'}", bin_sha256=sha)
    assert not (tmp_path / "ran").exists()


def test_a_failure_leaves_the_old_folder_alone(tmp_path):
    make(tmp_path / "a", source="random:llama", seed=3)
    before = contents(tmp_path / "a")
    for block, message in (
        ({"source": "random:mamba"}, "model 'tiny': no random architecture 'mamba'"),
        ({"source": "web:x"}, "source 'web:x' must be hub:"),
        ({"source": f"path:{tmp_path / 'none'}"}, "is not a model folder"),
        ({"source": "random:llama", "dtype": "int8"}, "dtype 'int8' is no floating-point type"),
        ({"source": "pypi:a==1/b.gguf"}, "states the file's sha256"),
        ({"source": "pypi:a==1/b.gguf", "sha256": "0"}, "no checksum"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "a", **block)
    assert contents(tmp_path / "a") == before


def hub_process(code, tmp_path, **environment):
    """Run code in a fresh Python: the hub client reads its environment when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env=clean | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"} | environment)  # fmt: skip


def test_a_cached_hub_model_works_offline_at_its_pinned_commit(tmp_path):
    make(tmp_path / "a", source="random:llama", seed=3)
    snapshot = tmp_path / "hf" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "a").iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    code = f"""
from experiments import weights
from experiments.errors import UserError
print(weights.materialise(name="t", block={{"source": "hub:someone/tiny@{COMMIT}"}}, packages={{}},
                          out_dir={str(tmp_path / "b")!r})["revision"])
try:
    weights.materialise(name="t", block={{"source": "hub:someone/other"}}, packages={{}}, out_dir={str(tmp_path / "c")!r})
except UserError as error:
    print(error)
"""
    done = hub_process(code, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    revision, refusal = done.stdout.strip().splitlines()
    assert revision == COMMIT
    assert refusal.startswith("model 't': model 'someone/other' at revision main is not in the local hub cache")
    assert weights.tensor_sha256(tmp_path / "b") == weights.tensor_sha256(tmp_path / "a")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated repository, a missing one and a missing revision."""

    def do_GET(self):
        if "/gated" in self.path:
            code, kind = 403, "GatedRepo"
        elif "/known" in self.path:
            code, kind = 404, "RevisionNotFound"
        else:
            code, kind = 401, "RepoNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Error-Message", "no")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_gated_missing_and_unreachable_hub_models_are_told_apart(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import sys
from experiments import hub
from experiments.errors import UserError
for name in sys.argv[1:] or ["someone/gated", "someone/known", "someone/none", "not/a/name"]:
    try:
        hub.snapshot(name, revision="main", patterns=["*.json"])
    except UserError as error:
        print(error)
"""
    try:
        said = hub_process(code, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    gated, revision, missing, invalid = said.stdout.strip().splitlines()
    assert "model 'someone/gated'" in gated and "is gated: accept its terms at" in gated and "hf auth login" in gated
    assert "'someone/known'" in revision and "not that revision" in revision
    assert "'someone/none'" in missing and "was not found on the hub" in missing
    assert "OWNER/NAME" in invalid
    # the server is gone: nobody answers there any more
    gone = hub_process(code.replace("sys.argv[1:] or ", "").replace(', "someone/known", "someone/none", "not/a/name"', ""),
                       tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")  # fmt: skip
    assert "the hub is not reachable" in gone.stdout, gone
