"""The codec keeps causality, shapes and determinism, and refuses what would break them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wgpt import codec
from wgpt.codec import weights as codec_weights
from wgpt.codec.training import synth
from wgpt.files import read_json, sha256_of

HOP = 320


def _random_model(**changes):
    """An EnCodec with random weights and random codebooks, small unless `changes` say so."""
    modeling = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    torch.manual_seed(0)
    fields = dict(
        target_bandwidths=[0.75, 1.5], num_filters=4, hidden_size=16, codebook_dim=16,
        num_lstm_layers=1, sampling_rate=24_000, audio_channels=1, normalize=False,
    )  # fmt: skip
    model = modeling.EncodecModel(modeling.EncodecConfig(**(fields | changes)))
    with torch.no_grad():  # entries about where the latents lie, so that tokens vary
        latents = model.encoder(0.3 * torch.randn(1, 1, 24_000))[0]
        mean, spread = latents.mean(1), latents.std(1)
        for k, layer in enumerate(model.quantizer.layers):
            noise = torch.randn_like(layer.codebook.embed) * spread * 0.9**k
            layer.codebook.embed.copy_(noise + mean if k == 0 else noise)
    return model.eval()


@pytest.fixture(scope="module")
def mini() -> codec.Codec:
    return codec.load("mini")


@pytest.fixture(scope="module")
def reflecting(tmp_path_factory) -> Path:
    """A folder with a small model padded by reflection, as the released EnCodec 24 kHz is."""
    folder = tmp_path_factory.mktemp("reflecting")
    _random_model(pad_mode="reflect").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A .th file as the original release names and keys it: full size, random weights."""
    path = tmp_path_factory.mktemp("original") / "encodec_24khz.th"
    to_original = {
        codec_weights.rename_original(old): old for old in _original_keys(n_codebooks=32)
    }
    model = _random_model(
        target_bandwidths=[1.5, 3.0, 6.0, 12.0, 24.0], num_filters=32, hidden_size=128,
        codebook_dim=128, num_lstm_layers=2,
    )  # fmt: skip
    state = {to_original[k]: v for k, v in model.state_dict().items()}
    assert len(state) == len(to_original) == 252
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"encodec_24khz-{digest[:8]}.th"))


def _original_keys(n_codebooks: int) -> list[str]:
    """The 252 keys of the original 24 kHz state dict, from its architecture."""
    keys = []
    for part, convolutions, upsampling in (
        ("encoder", (0, 3, 6, 9, 12, 15), ()),
        ("decoder", (0, 15), (3, 6, 9, 12)),
    ):
        stems = [f"{part}.model.{i}.conv.conv" for i in convolutions]
        stems += [f"{part}.model.{i}.convtr.convtr" for i in upsampling]
        for i in (1, 4, 7, 10) if part == "encoder" else (4, 7, 10, 13):
            stems += [f"{part}.model.{i}.block.{j}.conv.conv" for j in (1, 3)]
            stems.append(f"{part}.model.{i}.shortcut.conv.conv")
        keys += [f"{stem}.{leaf}" for stem in stems for leaf in ("bias", "weight_g", "weight_v")]
        lstm = f"{part}.model.{13 if part == 'encoder' else 1}.lstm"
        keys += [
            f"{lstm}.{kind}_{side}_l{layer}"
            for kind in ("weight", "bias") for side in ("ih", "hh") for layer in (0, 1)
        ]  # fmt: skip
    keys += [
        f"quantizer.vq.layers.{k}._codebook.{leaf}"
        for k in range(n_codebooks) for leaf in ("inited", "cluster_size", "embed", "embed_avg")
    ]  # fmt: skip
    return keys


def _music(seconds: float = 1.0, seed: int = 5) -> torch.Tensor:
    return torch.from_numpy(synth.render_music(seconds, seed))


def test_mini_states_its_rates_and_size(mini):
    assert (mini.name, mini.sample_rate_hz, mini.hop_samples) == ("mini", 24_000, HOP)
    assert (mini.frame_rate_hz, mini.n_codebooks, mini.codebook_size) == (75.0, 8, 1024)
    weights = codec_weights.ASSETS / "mini" / "model.safetensors"
    assert weights.stat().st_size <= 6_000_000
    assert mini.identity["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    json.dumps(mini.identity)


def test_mini_reconstructs_better_with_more_codebooks(mini):
    from wgpt.codec.training.score import si_sdr_db

    wave = _music(4.0, seed=77)
    tokens = mini.encode(wave)
    ratios = [si_sdr_db(mini.decode(tokens[:k]).numpy(), wave.numpy()) for k in (1, 2, 8)]
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] > 4.0  # dB; silence gives -120, noise at the same level about -30


@pytest.mark.parametrize("n_samples", [0, 1, 319, 320, 321, 640, 12_345])
def test_encode_drops_the_frame_built_on_padding(mini, n_samples):
    wave = _music()[:n_samples]
    tokens = mini.encode(wave)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (8, n_samples // HOP)
    assert mini.encode(wave[None]).shape == (1, 8, n_samples // HOP)
    decoded = mini.decode(tokens)
    assert decoded.shape == (n_samples // HOP * HOP,)
    assert decoded.dtype == torch.float32


@pytest.mark.parametrize("which", ["mini", "reflecting"])
@pytest.mark.parametrize("frame", [1, 2, 3, 40])
def test_tokens_ignore_later_samples(which, frame, mini, reflecting):
    model = mini if which == "mini" else codec.load(reflecting)
    wave = _music()
    changed = wave.clone()
    changed[frame * HOP :] = 0.5 * torch.randn(changed[frame * HOP :].shape)
    before, after = model.encode(wave), model.encode(changed)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("which", ["mini", "reflecting"])
@pytest.mark.parametrize("frame", [1, 3, 40])
def test_decoded_samples_ignore_later_tokens(which, frame, mini, reflecting):
    model = mini if which == "mini" else codec.load(reflecting)
    tokens = model.encode(_music())
    changed = tokens.clone()
    changed[:, frame:] = (changed[:, frame:] + 311) % 1024
    before, after = model.decode(tokens), model.decode(changed)
    assert torch.equal(before[: frame * HOP], after[: frame * HOP])
    assert not torch.equal(before[frame * HOP :], after[frame * HOP :])


def test_bare_reflecting_model_leaks_the_future_which_lead_frames_remove(reflecting):
    assert codec.load(reflecting).identity["lead_frames"] > 0
    encoder = _random_model(pad_mode="reflect").encoder
    wave = _music()
    changed = wave.clone()
    changed[HOP:] = 0.5 * torch.randn(changed[HOP:].shape)
    with torch.no_grad():
        bare = [encoder(x[None, None])[..., 0] for x in (wave, changed)]
    assert not torch.equal(*bare)


def test_tokens_repeat_for_any_number_of_threads(mini):
    wave = _music(3.0)
    n_threads = torch.get_num_threads()
    try:
        seen = []
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            seen.append(mini.encode(wave))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_batch_gives_the_tokens_of_its_items(mini):
    waves = torch.stack([_music(1.0, seed) for seed in (1, 2, 3)])
    batch = mini.encode(waves)
    single = torch.stack([mini.encode(wave) for wave in waves])
    # Another batch size may round differently, and a near tie may then fall the other way.
    assert (batch == single).float().mean() > 0.99
    decoded = mini.decode(batch[:, :2])
    assert decoded.shape == (3, 24_000)
    torch.testing.assert_close(decoded[1], mini.decode(batch[1, :2]), rtol=1e-4, atol=1e-5)


def test_decode_uses_the_first_codebooks_given(mini):
    tokens = mini.encode(_music())
    others = tokens.clone()
    others[3:] = 0
    assert torch.equal(mini.decode(tokens[:3]), mini.decode(others[:3]))
    assert not torch.equal(mini.decode(tokens), mini.decode(others))


@pytest.mark.parametrize(
    ("wave", "says"),
    [
        (torch.zeros(2, 3, 640), "must be floating point"),
        (torch.zeros(640, dtype=torch.int16), "must be floating point"),
        (torch.full((640,), float("nan")), "NaN"),
    ],
)
def test_encode_refuses_bad_waves(mini, wave, says):
    with pytest.raises(codec.CodecError, match=says):
        mini.encode(wave)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (torch.zeros(8, 4), "must be integers"),
        (torch.zeros(9, 4, dtype=torch.int64), "has 8 codebooks, got 9"),
        (torch.zeros(0, 4, dtype=torch.int64), "has 8 codebooks, got 0"),
        (torch.full((1, 4), 1024), r"\[0, 1024\)"),
        (torch.full((1, 4), -1), r"\[0, 1024\)"),
    ],
)
def test_decode_refuses_bad_codes(mini, codes, says):
    with pytest.raises(codec.CodecError, match=says):
        mini.decode(codes)


def test_folder_gives_the_codes_of_transformers(tmp_path):
    model = _random_model(pad_mode="constant")
    model.save_pretrained(tmp_path / "mine")
    loaded = codec.load(tmp_path / "mine")
    assert loaded.name == "mine"
    wave = _music()
    with torch.no_grad():
        expected = model.encode(wave[None, None], bandwidth=1.5).audio_codes[0, 0]
        sound = model.decode(expected[None, None], [None]).audio_values[0, 0]
    assert expected.unique().numel() > 20
    assert torch.equal(loaded.encode(wave), expected)
    torch.testing.assert_close(loaded.decode(expected), sound, rtol=0, atol=1e-5)


def test_folder_written_by_us_is_one_that_transformers_reads(tmp_path):
    modeling = pytest.importorskip("transformers.models.encodec.modeling_encodec")
    mini = codec.load("mini")
    model = modeling.EncodecModel.from_pretrained(
        codec_weights.ASSETS / "mini", dtype=torch.float32
    )
    wave = _music()
    with torch.no_grad():
        expected = model.encode(wave[None, None], bandwidth=6.0).audio_codes[0, 0]
    assert torch.equal(mini.encode(wave), expected)


def assert_equal_tokens(ours, theirs, wave):
    """Equal wherever rounding does not decide: where two entries are as near as each other, sums in
    another order, as on another CPU, give the other. Such frames change with a millionth of level.
    """
    tokens, expected = ours.encode(wave), theirs.encode(wave)
    settled = torch.ones(tokens.shape[1], dtype=torch.bool)
    for gain in (1 - 3e-6, 1 - 1e-6, 1 + 1e-6, 1 + 3e-6):
        for one, of in ((ours, tokens), (theirs, expected)):
            settled &= (one.encode(wave * gain) == of).all(0)
    assert settled.float().mean() > 0.95
    assert torch.equal(tokens[:, settled], expected[:, settled])
    return tokens


def test_released_architecture_gives_the_tokens_of_transformers(original):
    wave = _music()
    ours, theirs = codec.load(original), codec.load(original, implementation="transformers")
    assert (ours.n_codebooks, ours.identity["lead_frames"]) == (32, 8)
    tokens = assert_equal_tokens(ours, theirs, wave)
    assert tokens.unique().numel() > 50
    torch.testing.assert_close(ours.decode(tokens), theirs.decode(tokens), rtol=0, atol=1e-5)
    with pytest.raises(codec.CodecError, match="only implementation='wgpt' can stream"):
        theirs.stream_encoder()


def test_a_packaged_codec_is_found_by_its_sha256():
    old = "c9ef1e414d8b1b7bbc1341f91ee7cce9e961d3cc421459d2c3a0c788ba86479b"
    assert codec.load("mini-v1").identity["sha256"] == old
    assert codec.load("mini", sha256=old).identity["sha256"] == old
    with pytest.raises(codec.CodecError, match=r"must have sha256 0{64}.*prepare the data anew"):
        codec.load("mini", sha256="0" * 64)


def test_the_old_codec_may_be_missing_and_says_where_it_is(tmp_path, monkeypatch):
    """The source distribution leaves it out."""
    from wgpt import doctor

    old = codec.load("mini-v1").identity["sha256"]
    shutil.copytree(codec_weights.ASSETS / "mini", tmp_path / "mini")
    monkeypatch.setattr(codec_weights, "ASSETS", tmp_path)
    with pytest.raises(codec.CodecError, match=r"install a wheel, or copy wgpt/assets/mini-v1 of"):
        codec.load("mini", sha256=old)
    found = {finding.subject: finding.status for finding in doctor.check_assets()}
    assert (found["codec mini"], found["codec mini-v1"]) == ("ok", "note")


def test_identities_under_other_names_mean_the_same_tokens():
    identity = codec.load("mini-v1").identity
    assert codec.same_tokens(identity, identity | {"name": "mini", "implementation": "encodec"})
    assert not codec.same_tokens(identity, identity | {"sha256": "0" * 64})


def test_original_file_loads_strictly_and_checks_its_digest(original, tmp_path):
    loaded = codec.load(original)
    assert (loaded.n_codebooks, loaded.hop_samples) == (32, HOP)
    assert loaded.encode(_music(0.2)).shape == (32, 15)
    copy = tmp_path / "encodec_24khz-d7cc33bc.th"
    copy.write_bytes(original.read_bytes())
    with pytest.raises(codec.CodecError, match="sha256 should begin with d7cc33bc"):
        codec.load(copy)


@pytest.mark.skipif(
    importlib.util.find_spec("encodec") is None, reason="the package encodec is not installed"
)
def test_encodec_package_gives_equal_tokens(original, reflecting):
    wave = _music()
    for path in (original, reflecting):
        ours = codec.load(path)
        theirs = codec.load(path, implementation="encodec")
        tokens = assert_equal_tokens(ours, theirs, wave)
        assert tokens.unique().numel() > 10
        torch.testing.assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert "torchaudio" not in sys.modules or sys.modules["torchaudio"].__file__


def test_encodec_24khz_is_found_in_the_caches(original, monkeypatch, tmp_path):
    folder = tmp_path / "hub" / "models--facebook--encodec_24khz" / "snapshots" / "abc"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    _random_model(pad_mode="constant").save_pretrained(folder)
    assert codec.load("encodec_24khz").n_codebooks == 2
    (folder / "config.json").unlink()
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setattr(codec_weights, "ENCODEC_FILE", original.name)
    (checkpoints / original.name).symlink_to(original)
    with pytest.raises(codec.CodecError, match="must have sha256 d7cc33bcf1aad7f2dad9836f36431530"):
        codec.load("encodec_24khz")
    monkeypatch.setattr(codec_weights, "ENCODEC_FILE_SHA256", sha256_of(original))
    assert codec.load("encodec_24khz").n_codebooks == 32


def test_a_download_of_encodec_24khz_is_of_one_commit_and_checked(monkeypatch, tmp_path):
    asked = []
    commit = codec_weights.ENCODEC_REVISION
    repository = tmp_path / "hub" / "models--facebook--encodec_24khz"

    def download(name, revision, allow_patterns):
        """As huggingface_hub lays its cache: names of a snapshot link to files named by hash."""
        asked.append((name, revision))
        snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
        blobs.mkdir(parents=True)
        _random_model(pad_mode="constant").save_pretrained(snapshot)
        weights = snapshot / "model.safetensors"
        blob = blobs / sha256_of(weights)
        weights.rename(blob)
        weights.symlink_to(blob)
        return str(snapshot)

    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert codec.load("encodec_24khz", download=True).n_codebooks == 2
    assert asked == [("facebook/encodec_24khz", commit)] and len(commit) == 40
    (
        other := repository / "snapshots" / ("0" * 40)
    ).mkdir()  # of the cache, the same commit is taken
    for name in ("config.json", "model.safetensors"):
        (other / name).write_text("{}")
    assert codec.load("encodec_24khz").n_codebooks == 2
    blob = next((repository / "blobs").iterdir())
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    with pytest.raises(codec.CodecError, match=f"recorded, {blob.name}, got .* download it again"):
        codec.load("encodec_24khz")


def test_missing_encodec_24khz_says_at_once_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(codec.CodecError, match=r"encodec_24khz-d7cc33bc\.th.*d7cc33bc.*checkpoint"):
        codec.load("encodec_24khz")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("name", ["encodec_48khz", "some/encodec_48khz-7e698e3e.th"])
def test_48khz_model_is_refused_because_it_is_not_causal(name):
    with pytest.raises(codec.CodecError, match="not causal"):
        codec.load(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_causal_conv": False}, "see the future"),
        ({"audio_channels": 2}, "mono"),
        ({"normalize": True}, "loudness"),
        ({"chunk_length_s": 1.0}, "chunk_length_s"),
        ({"norm_type": "time_group_norm"}, "weight_norm"),
        ({"num_filters": 8}, "do not fit"),
    ],
)
def test_unusable_configs_are_refused_with_the_reason(reflecting, tmp_path, change, says):
    config = read_json(reflecting / "config.json") | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((reflecting / "model.safetensors").read_bytes())
    with pytest.raises(codec.CodecError, match=says):
        codec.load(tmp_path)


def test_damaged_and_missing_files_are_named(reflecting, tmp_path):
    with pytest.raises(codec.CodecError, match="neither mini"):
        codec.load(tmp_path / "nothing")
    with pytest.raises(codec.CodecError, match=r"has no config\.json"):
        codec.load(tmp_path)
    (tmp_path / "config.json").write_bytes((reflecting / "config.json").read_bytes())
    half = (reflecting / "model.safetensors").read_bytes()[:5000]
    (tmp_path / "model.safetensors").write_bytes(half)
    with pytest.raises(codec.CodecError, match="damaged"):
        codec.load(tmp_path)
    (tmp_path / "model.th").write_bytes(b"not a checkpoint")
    with pytest.raises(codec.CodecError, match=r"not an EnCodec \.th"):
        codec.load(tmp_path / "model.th")
    with pytest.raises(codec.CodecError, match="implementation"):
        codec.load(reflecting, implementation="other")


def test_loading_leaves_the_random_state_alone(reflecting):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    codec.load(reflecting)
    assert torch.equal(torch.rand(2), expected)


def test_importing_codec_does_not_import_transformers():
    code = "import sys, wgpt.codec; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd="/").returncode == 0
