"""Models on the Hugging Face Hub: pushed to and loaded from a stand-in of its HTTP interface."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub_server import serve

import wgpt
from wgpt import audio, codec, doctor, hub
from wgpt.cli import main
from wgpt.codec.training import synth
from wgpt.codec.weights import ASSETS
from wgpt.errors import CodecError, ConfigError
from wgpt.model import HybridModel
from wgpt.runs import pretrained

PUSH = """
import sys, wgpt
print(wgpt.push_to_hub(sys.argv[1], "me/voice", license="cc-by-4.0"))
wgpt.push_to_hub("starter", "me/voice", license="mit", revision="v2")
wgpt.load("me/voice@v2", download=True)

wgpt.push_to_hub(sys.argv[1], "me/again", license="mit")
wgpt.load("me/again", download=True)
wgpt.push_to_hub("me/again", "you/copy", license="mit")  # with the codec beside it
wgpt.push_to_hub("starter", "me/again", license="mit")  # without the codec that was there

wgpt.push_to_hub(sys.argv[2], "me/my-codec", license="cc0-1.0")
wgpt.codec.load("me/my-codec", download=True)
"""

FAIL = """
import huggingface_hub, wgpt
for act in (lambda: wgpt.load("me/nothing", download=True),
            lambda: wgpt.push_to_hub("starter", "me/voice", license="mit")):
    try:
        act()
    except wgpt.WgptError as error:
        print(error)
    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
"""


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("huggingface_hub")
    server = serve()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """Of a process whose Hub is the stand-in, and whose cache is empty at first."""
    there = "http://{}:{}".format(*server.server_address)
    given = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    given |= {"HF_ENDPOINT": there, "HF_TOKEN": "hf_anything", "HF_HUB_DISABLE_XET": "1"}
    return given | {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def own(tiny_run, tmp_path_factory):
    """The tiny run's model as if its codec were a folder of the user's own."""
    root = tmp_path_factory.mktemp("own")
    shutil.copytree(ASSETS / "mini", root / "my-codec")
    shutil.copytree(tiny_run, root / "run")
    path = root / "run" / "model" / "config.json"
    facts = json.loads(path.read_text())
    facts.pop("seal")
    facts["codec"]["source"] = str(root / "my-codec")
    path.write_text(json.dumps(facts))
    return root / "run"


def python(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120,
        cwd=environment["HF_HOME"],  # not the source tree, whose wgpt may have no _C
    )  # fmt: skip


def with_packages_alone(folder, environment, names):
    """`environment` of a Python that has wgpt, the named packages and what these require."""
    folder.mkdir()
    (folder / "wgpt").symlink_to(Path(wgpt.__file__).parent)
    asked, known = list(names), set()
    while asked:
        name = asked.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another Python or platform
        if found.metadata["Name"] in known:
            continue
        known.add(found.metadata["Name"])
        lines = [line for line in found.requires or () if "extra ==" not in line]
        asked += [re.match(r"[\w.-]+", line)[0] for line in lines]
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return environment | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def pushed(server, environment, own):
    """me/voice: main, and a branch v2 with the packaged model, which is then in the cache."""
    done = python(environment, "-c", PUSH, str(own), str(own.with_name("my-codec")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/voice")
    return server.hub.files["me/voice"]


@pytest.fixture
def cache(environment, monkeypatch):
    """This process sees the cache of `environment`, and no server."""
    monkeypatch.setenv("HF_HOME", environment["HF_HOME"])
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def test_push_sends_model_codec_and_a_card_with_a_header(pushed, own):
    main_branch = pushed["main"]
    assert set(main_branch) == {
        "README.md", "config.json", "model.safetensors", "codec/config.json",
        "codec/model.safetensors",
    }  # fmt: skip
    weights = (own / "model" / "model.safetensors").read_bytes()
    assert main_branch["model.safetensors"] == weights
    yaml = pytest.importorskip("yaml")
    _, header, body = main_branch["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["license"] == "cc-by-4.0"
    assert facts["library_name"] == "wgpt"
    metrics = facts["model-index"][0]["results"][0]["metrics"]
    nll = next(m["value"] for m in metrics if m["type"] == "nll_nats")
    assert f"nll_nats {nll:.4f}" in body  # the figure of the card itself
    assert 'wgpt.load("me/voice", download=True)' in body


def test_a_model_of_the_hub_is_pushed_again_with_its_codec_and_one_header(pushed, server):
    copy = server.hub.files["you/copy"]["main"]
    assert copy["codec/model.safetensors"] == pushed["main"]["codec/model.safetensors"]
    card = copy["README.md"].decode()
    assert card.count("---\n") == 2 and card.count("import wgpt") == 1
    assert not any(path.startswith("codec/") for path in server.hub.files["me/again"]["main"])


def test_a_codec_is_pushed_with_a_card_and_found_in_the_cache(pushed, server, cache):
    files = server.hub.files["me/my-codec"]["main"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: wgpt\nlicense: cc0-1.0\n")
    assert card.count("---\n") == 2 and 'wgpt.codec.load("me/my-codec", download=True)' in card
    loaded, mini = codec.load("me/my-codec"), codec.load("mini")
    assert codec.same_tokens(loaded.identity, mini.identity)


def test_a_damaged_codec_is_not_pushed(own, tmp_path):
    folder = shutil.copytree(own.with_name("my-codec"), tmp_path / "codec")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CodecError, match="is damaged"):
        wgpt.push_to_hub(folder, "me/codec", license="mit")


def test_revision_is_found_in_the_cache(pushed, cache):
    newer = HybridModel.from_pretrained("me/voice", revision="v2").state_dict()
    starter = HybridModel.from_pretrained(pretrained.FOLDER).state_dict()
    assert newer.keys() == starter.keys()
    assert all(torch.equal(newer[name], starter[name]) for name in starter)
    folder = pretrained.model_folder("me/voice@v2")
    assert hub.cached("me/voice", folder.name) == folder  # a commit is a revision too
    with pytest.raises(ConfigError, match=r"me/voice@v3: no such folder.*--revision v3"):
        wgpt.load("me/voice@v3")


def test_name_loads_only_where_a_download_is_allowed_and_then_from_the_cache(
    pushed, server, environment, cache, own, tmp_path, capsys
):
    prompt = tmp_path / "x.wav"
    audio.write(prompt, synth.render_music(1.0, seed=9))
    flags = ["--prompt", str(prompt), "--seconds", "0.2", "--out"]
    command = ["generate", "me/voice@main", *flags]
    n_before = len(server.hub.requests)
    assert main([*command, str(tmp_path / "y.wav")]) == 2
    said = capsys.readouterr().err
    assert "--download" in said and "hf download me/voice --revision main" in said
    assert len(server.hub.requests) == n_before

    fetched = python(environment, "-m", "wgpt", *command, str(tmp_path / "y.wav"), "--download")
    assert fetched.returncode == 0, fetched.stderr
    n_before = len(server.hub.requests)
    assert main([*command, str(tmp_path / "cached.wav")]) == 0
    assert len(server.hub.requests) == n_before
    assert main(["generate", str(own), *flags, str(tmp_path / "own.wav")]) == 0
    expected = (tmp_path / "own.wav").read_bytes()
    assert (tmp_path / "y.wav").read_bytes() == expected
    assert (tmp_path / "cached.wav").read_bytes() == expected
    beside = pretrained.model_folder("me/voice@main") / "codec"
    assert wgpt.load("me/voice@main").codec.source == str(beside)


@pytest.mark.slow
def test_an_environment_with_nothing_else_loads_it_by_name(pushed, server, environment, own,
                                                           tmp_path):  # fmt: skip
    """Only what `pip install wgpt` brings, and the Hub's client for the download."""
    prompt = tmp_path / "x.wav"
    audio.write(prompt, synth.render_music(1.0, seed=9))
    (tmp_path / "hf").mkdir()
    empty = environment | {"HF_HOME": str(tmp_path / "hf")}
    core = with_packages_alone(tmp_path / "core", empty, doctor.REQUIRED)
    client = (*doctor.REQUIRED, "huggingface_hub")
    downloading = with_packages_alone(tmp_path / "client", empty, client)
    others = ["matplotlib", "pytest", "scipy", "transformers"]
    code = f"import importlib.util as u; print([n for n in {others} if u.find_spec(n)])"
    for env in (core, downloading):
        assert python(env, "-S", "-c", code).stdout == "[]\n"

    def generate(env, name, *flags):
        words = ["generate", name, *flags, "--prompt", str(prompt), "--seconds", "0.2"]
        out = tmp_path / f"{len(list(tmp_path.glob('*.wav')))}.wav"
        done = python(env, "-S", "-m", "wgpt", *words, "--out", str(out))
        return done, out.read_bytes() if out.exists() else None

    n_before = len(server.hub.requests)
    refused, _ = generate(core, "me/voice")
    assert refused.returncode == 2
    assert refused.stderr.startswith("wgpt generate: me/voice: no such folder") and (
        "allow a download with --download" in refused.stderr
    )
    refused, _ = generate(core, "me/voice", "--download")
    assert refused.returncode == 2
    assert refused.stderr.endswith("needs huggingface_hub: pip install 'wgpt[download]'\n")
    assert len(server.hub.requests) == n_before
    fetched, wave = generate(downloading, "me/voice", "--download")
    assert fetched.returncode == 0, fetched.stderr
    again, same = generate(core, "me/voice")  # from the cache
    assert again.returncode == 0, again.stderr
    assert same == wave == generate(core, str(own))[1]


def test_damage_in_the_cache_is_found(pushed, environment, monkeypatch, tmp_path):
    shutil.copytree(environment["HF_HOME"], tmp_path / "hf", symlinks=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    weights = (hub.cached("me/voice", "v2") / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: sha256 must be"):
        wgpt.load("me/voice@v2")


def test_codec_of_the_hub_is_named_like_a_model(environment, monkeypatch, tmp_path):
    snapshot = tmp_path / "hub" / "models--me--codec" / "snapshots" / "abc"
    shutil.copytree(ASSETS / "mini", snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert codec.load("me/codec").name == "me/codec"
    assert codec.same_tokens(codec.load("me/codec").identity, codec.load("mini").identity)
    with pytest.raises(CodecError, match=r"me/other: no such folder.*hf download me/other"):
        codec.load("me/other")


def test_unreachable_hub_and_unknown_name_are_one_sentence(environment):
    done = python(environment, "-c", FAIL)
    unknown, unreachable = done.stdout.splitlines()
    assert unknown.startswith("me/nothing: the download failed: ")
    assert unreachable.startswith("push_to_hub: me/voice: the upload failed: ")


def test_cache_lies_where_the_client_has_it(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "huggingface" / "hub" / "models--me--codec" / "snapshots" / "abc"
    shutil.copytree(ASSETS / "mini", folder)
    assert hub.cached("me/codec") == folder


@pytest.mark.parametrize("name", ["voice", "a/b/c", "../b", "a/", "a/b c", "-a/b"])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(name, tmp_path):
    with pytest.raises(ConfigError, match="must be user/model"):
        hub.push(tmp_path, name)


def test_a_folder_comes_before_the_hub(tiny_run, monkeypatch, tmp_path):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "voice").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    assert pretrained.model_folder("me/voice", download=True).samefile(tiny_run / "model")
    assert main(["generate", "me/voise", "--seconds", "1", "--out", "y.wav"]) == 2


def test_auto_model_of_transformers_gives_our_logits(tiny_run):
    transformers = pytest.importorskip("transformers")
    import wgpt.model.auto  # noqa: F401

    ours = HybridModel.from_pretrained(tiny_run)
    theirs = transformers.AutoModel.from_pretrained(tiny_run / "model", local_files_only=True)
    assert transformers.AutoConfig.from_pretrained(tiny_run / "model").model_type == "wgpt"
    tokens, frames = torch.randint(0, 1024, (1, 7)), torch.randn(1, 7, ours.config.n_mels)
    with torch.no_grad():
        assert torch.equal(theirs(tokens, frames).logits, ours(tokens, frames))
