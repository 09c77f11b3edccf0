"""Finding and reading codec weights: Hugging Face folders, original .th files, caches.

Nothing here unpickles objects: .th files are read with ``torch.load(weights_only=True)``.
Nothing touches the network unless `download` is asked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wgpt import hub
from wgpt.codec.network import Architecture, parameter_shapes
from wgpt.errors import CodecError
from wgpt.files import check_sha256, read_json, sha256_of

ASSETS = Path(__file__).parents[1] / "assets"
PACKAGED = {  # and the sha256 of their files; mini-v1 is what mini was in version 0.1.0
    "mini": {
        "config.json": "8276a5928ddc0c65c38d533dab4f58b9ca4d518a745d3f6cda38e20464cab533",
        "model.safetensors": "8d65082e935aaf77f6f572b151289aa705bc489ab142bdd71fdaf7c8630416c6",
    },
    "mini-v1": {
        "config.json": "d1c7c6ebb6f708b3e7dd56752dfc6477d7508ddda2cdc6e91b58a73593e6360d",
        "model.safetensors": "c9ef1e414d8b1b7bbc1341f91ee7cce9e961d3cc421459d2c3a0c788ba86479b",
    },
}
ENCODEC_REPOSITORY = "facebook/encodec_24khz"
ENCODEC_REVISION = "c1dbe2ae3f1de713481a3b3e7c47f357092ee040"  # what a download takes
ENCODEC_FILE = "encodec_24khz-d7cc33bc.th"
ENCODEC_FILE_SHA256 = "d7cc33bcf1aad7f2dad9836f36431530744abeace3ca033005e3290ed4fa47bf"

# The codebooks' running means serve training only; a file may leave them out.
_TRAINING_ONLY = ("embed_avg", "cluster_size", "inited")

# Names in the original EnCodec release -> names in transformers, applied in order.
_RENAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.convtr\.convtr\.", ".conv."),
    (r"^quantizer\.vq\.layers", "quantizer.layers"),
    (r"\._codebook\.", ".codebook."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


@dataclass(frozen=True)
class CodecWeights:
    """Weights and architecture of an EnCodec model, independent of who runs it.

    Attributes:
        name: "mini", "mini-v1", "encodec_24khz" or the name of the folder.
        architecture: causal, mono.
        tensors: float32, under transformers' names, of `network.parameter_shapes`.
        sha256: of the weights file, 64 hex digits.
    """

    name: str
    architecture: Architecture
    tensors: dict[str, Tensor] = field(repr=False)
    sha256: str

    def codebooks(self) -> Tensor:
        """The codebooks, float32 (K, V, E)."""
        names = (
            f"quantizer.layers.{k}.codebook.embed" for k in range(self.architecture.n_codebooks)
        )
        return torch.stack([self.tensors[name] for name in names])


def rename_original(key: str) -> str:
    """The transformers name of a key of an original EnCodec state dict."""
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def read(name_or_path: str | os.PathLike[str], *, download: bool = False) -> CodecWeights:
    """Find and read weights: "mini", "mini-v1", "encodec_24khz", a folder, a .th file, user/codec.

    Raises:
        CodecError: nothing there, a damaged file, or a model that cannot be used.
    """
    text = os.fspath(name_or_path)
    if "48khz" in Path(text).name:
        raise CodecError(
            f"codec: {text} is the 48 kHz EnCodec, which is not causal: its tokens see later "
            "audio, so a next-token model trained on them would cheat; use encodec_24khz or mini"
        )
    if text in PACKAGED:
        if text == "mini-v1" and not (ASSETS / text).exists():  # pyproject.toml: sdist.exclude
            raise CodecError(
                "codec: mini-v1 comes with wgpt's wheels and its repository, not with its source "
                "distribution; install a wheel, or copy wgpt/assets/mini-v1 of a clone to "
                f"{ASSETS / text}"
            )
        check_sha256(ASSETS / text, PACKAGED[text], CodecError, "install wgpt again")
        return _read_folder(ASSETS / text, text)
    if text == "encodec_24khz":
        path = _find_encodec_24khz(download)
        return _read_original(path) if path.suffix == ".th" else _read_folder(path, text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _read_folder(path, path.resolve().name)
    if path.is_file() and path.suffix == ".th":
        return _read_original(path)
    if hub.is_name(text):
        return _read_folder(hub.find(text, download=download, error=CodecError), text)
    raise CodecError(
        f"codec: {text!r} is neither {', '.join(PACKAGED)} nor encodec_24khz nor a folder with "
        "config.json and model.safetensors nor an original .th file nor user/codec of the Hub"
    )


def packaged_with(sha256: str) -> str | None:
    """The name of the packaged codec whose weights file has this sha256."""
    found = (name for name, sums in PACKAGED.items() if sums["model.safetensors"] == sha256)
    return next(found, None)


def _read_folder(folder: Path, name: str) -> CodecWeights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise CodecError(
                f"codec: folder {folder} has no {path.name}; expected config.json and "
                "model.safetensors as save_pretrained of transformers' EncodecModel writes them"
            )
    try:
        config = read_json(config_path, CodecError)
        tensors = load_file(str(weights_path))
    except SafetensorError as error:
        raise CodecError(f"codec: {folder} is damaged ({error}); get its files again") from error
    if "sha256" in config:  # written by `wgpt codec-train`
        sums = {"model.safetensors": config["sha256"]}
        check_sha256(folder, sums, CodecError, "train or get the codec again")
    sha256 = sha256_of(weights_path)
    recorded = weights_path.resolve().name  # the Hub's cache names large files by their sha256
    if re.fullmatch("[0-9a-f]{64}", recorded) and sha256 != recorded:
        raise CodecError(
            f"codec: {weights_path} must have the sha256 that the Hub recorded, {recorded}, got "
            f"{sha256}; delete {weights_path.resolve()} and download it again"
        )
    return _checked(name, config, tensors, sha256)


def _read_original(path: Path) -> CodecWeights:
    import pickle

    sha256 = sha256_of(path)
    suffix = re.search(r"-([0-9a-f]{8})$", path.stem)
    if suffix and not sha256.startswith(suffix[1]):
        raise CodecError(
            f"codec: {path.name} is damaged: its sha256 should begin with {suffix[1]}, got "
            f"{sha256[:8]}; get the file again"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CodecError(f"codec: {path} is not an EnCodec .th file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CodecError(f"codec: {path} must hold a state dict of tensors")
    return _checked("encodec_24khz", {}, state, sha256)  # {}: Architecture's defaults


def _checked(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], sha256: str
) -> CodecWeights:
    architecture = Architecture.from_config(config, name)
    architecture.check_causal(name)
    found = {
        rename_original(k): v.float()
        for k, v in tensors.items()
        if k.rsplit(".", 1)[-1] not in _TRAINING_ONLY
    }
    shapes = parameter_shapes(architecture)
    missing = sorted(shapes.keys() - found.keys())
    unexpected = sorted(found.keys() - shapes.keys())
    if missing or unexpected:
        raise CodecError(
            f"codec: weights of {name} do not fit its config: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    for key, shape in shapes.items():
        if tuple(found[key].shape) != shape:
            raise CodecError(
                f"codec: weights of {name} do not fit its config: {key} must have shape {shape}, "
                f"got {tuple(found[key].shape)}"
            )
    return CodecWeights(name, architecture, found, sha256)


def _find_encodec_24khz(download: bool) -> Path:
    """A folder in the Hub's cache, or the .th in torch's; downloads only when asked to."""
    found = hub.cached(ENCODEC_REPOSITORY, ENCODEC_REVISION) or hub.cached(ENCODEC_REPOSITORY)
    if found:
        return found
    original = Path(torch.hub.get_dir()) / "checkpoints" / ENCODEC_FILE
    if original.is_file():
        sums = {ENCODEC_FILE: ENCODEC_FILE_SHA256}
        check_sha256(original.parent, sums, CodecError, "get the file again")
        return original
    places = (
        f"put the original file {ENCODEC_FILE} (sha256 begins with d7cc33bc) into "
        f"{original.parent}, or pass the path of that file, or of a folder with config.json and "
        f"model.safetensors of {ENCODEC_REPOSITORY}; the codec 'mini' needs no download"
    )
    if not download:
        raise CodecError(
            f"codec: encodec_24khz is not on this machine; pass download=True (--download), or "
            f"{places}"
        )
    try:
        return hub.find(ENCODEC_REPOSITORY, ENCODEC_REVISION, download=True, error=CodecError)
    except CodecError as error:
        raise CodecError(f"codec: {error}; or {places}") from error
