"""Model and codec folders of the Hugging Face Hub, by their names: `user/model`.

They are looked for in the Hub's cache on this machine; only `find(download=True)` and `push`
touch the network. Cache, server and token are those of the Hub's own client: HF_HOME,
HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and `hf auth login`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from wgpt.errors import ConfigError, WgptError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILES = ("config.json", "model.safetensors")  # without which a folder is none of ours
_PATTERNS = (*FILES, "README.md", "codec/config.json", "codec/model.safetensors")


def is_name(text: str) -> bool:
    """Whether a text can name a repository: `user/model`, ASCII, one slash."""
    return _NAME.fullmatch(text) is not None


def cached(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the Hub's cache that holds FILES; None where there is none.

    revision: branch, tag or commit; None: main, or any that is there.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", f"{caches}/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    folder = hub / ("models--" + repository.replace("/", "--"))
    name = folder / "refs" / (revision or "main")
    commits = [name.read_text().strip()] if name.is_file() else []
    commits += [revision] if revision else sorted(p.name for p in folder.glob("snapshots/*"))
    snapshots = (folder / "snapshots" / commit for commit in commits)
    return next((s for s in snapshots if all((s / name).is_file() for name in FILES)), None)


def find(
    repository: str,
    revision: str | None = None,
    *,
    download: bool = False,
    error: type[WgptError] = ConfigError,
) -> Path:
    """The folder of a repository: downloaded or brought up to date where that is allowed.

    revision: branch, tag or commit; None: main. Raises `error` where it is not in the cache, or
    cannot be downloaded.
    """
    at = f" --revision {revision}" if revision else ""
    if not download:
        folder = cached(repository, revision)
        if folder is None:
            raise error(
                f"{repository}{'@' + revision if revision else ''}: no such folder, and the Hub's "
                "cache has no such model; allow a download with --download (download=True), or "
                f"get it with `hf download {repository}{at}`"
            )
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise error(
            f"{repository}: a download needs huggingface_hub: pip install 'wgpt[download]'"
        ) from None
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_PATTERNS))
        )
    except Exception as problem:  # the Hub's client raises many unrelated types
        reason = " ".join(str(problem).split())[:300]
        raise error(f"{repository}: the download failed: {reason}") from problem


def check_push(repository: str) -> None:
    """Raises ConfigError for a name that is none, or without the Hub's client."""
    if not is_name(repository):
        raise ConfigError(f"push_to_hub: the name must be user/model, got {repository!r}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError("push_to_hub: needs huggingface_hub: pip install 'wgpt[download]'")


def push(
    folder: Path, repository: str, *, revision: str | None = None, private: bool = False
) -> str:
    """Uploads a folder as one commit; makes the repository where there is none. Returns its URL.

    A codec that was there, and is not in the folder, is deleted. Raises ConfigError where that is
    not possible.
    """
    check_push(repository)
    from huggingface_hub import HfApi

    api = HfApi(library_name="wgpt")
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(_PATTERNS),
            delete_patterns=["codec/*"],
            commit_message="Upload a model of wgpt",
        )
    except Exception as problem:  # as above
        reason = " ".join(str(problem).split())[:300]
        raise ConfigError(
            f"push_to_hub: {repository}: the upload failed: {reason}; `hf auth whoami` says who is "
            "logged in"
        ) from problem
    return url
