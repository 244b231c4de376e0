"""A model reference (folder, hub id, GGUF file or nothing) to the files it stands for."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.config import EngineConfig
from minivllm.inputs import RECOMMENDED
from minivllm.loading import embedded
from minivllm.loading.gguf_file import GGUFSource, gguf_tokenizer
from minivllm.loading.weights import PickleSource, SafetensorsSource, WeightSource
from minivllm.validation import reject_unknown

_CONFIG_FILES = ["config.json", "generation_config.json", "adapter_config.json"]
_TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_PICKLED_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Other formats of the same weights: subfolders such as original/ and onnx/, and Mistral's own file.
_DUPLICATES = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFiles:
    """What a model consists of. The parts that were not asked for are None."""

    name: str
    config: dict[str, Any]  # config.json as it is
    generation_config: dict[str, Any]  # {} if there is none
    tokenizer_folder: str | None  # for AutoTokenizer.from_pretrained
    weights: WeightSource | None

    def load_tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        if self.tokenizer_folder is None:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_folder)


def find_model(
    model: str | None, tokenizer: str | None, revision: str | None, skip_tokenizer_init: bool, config: EngineConfig
) -> tuple[ModelFiles, dict[str, Any]]:
    """The files of a model as `config` wants them (errors as for `resolve`), and the generation config that sampling
    defaults come from."""
    load_format = config.load_format
    if revision is not None and (model is None or Path(model).expanduser().exists()):
        raise ValueError("revision is for models on the hub; leave it out")
    if load_format == "gguf" and not _is_gguf(str(model)):
        raise ValueError(f"load_format='gguf' needs a .gguf file as model, got {model!r}")
    if load_format in ("safetensors", "pt") and (model is None or _is_gguf(model)):
        raise ValueError(f"load_format={load_format!r} does not fit the model {model!r}; leave it out")
    files = resolve(
        model, tokenizer, revision, need_tokenizer=not skip_tokenizer_init, need_weights=load_format != "dummy",
        pickled=load_format == "pt",
    )  # fmt: skip
    own = files.generation_config
    return files, sampling_defaults(own, config.generation_config, config.override_generation_config)


def resolve(
    model: str | None,
    tokenizer: str | None = None,
    revision: str | None = None,
    *,
    need_tokenizer: bool = True,
    need_weights: bool = True,
    pickled: bool = False,
) -> ModelFiles:
    """Find, and where necessary download or convert, the files of a model.

    `model` is a folder, a hub id ("org/name"), a .gguf file, or None for the embedded model. `tokenizer` names another
    place for the tokenizer, in the same ways; `revision` is a branch, tag or commit of `model` on the hub. What is not
    needed is not fetched. `pickled`: the weights are those of pytorch_model*.bin, which is never read otherwise.
    Raises FileNotFoundError for what is not there or cannot be reached, PermissionError for what the hub does not give
    without access, and ValueError for what is damaged or not supported; each says what to do.
    """
    name, model = (embedded.NAME, embedded.embedded_model()) if model is None else (model, model)
    own_tokenizer = need_tokenizer and tokenizer in (None, model)
    tokenizer_folder = None if own_tokenizer or not need_tokenizer else _tokenizer_folder(str(tokenizer))
    weights: WeightSource | None
    if _is_gguf(model):
        path = Path(model).expanduser()
        weights = source = GGUFSource(path)
        config = source.config
        generation_config = {key: value for key, value in config.items() if key.endswith("_token_id")}
        if own_tokenizer:
            tokenizer_folder = gguf_tokenizer(path)
    else:
        weight_files = _PICKLED_FILES if pickled else _WEIGHT_FILES
        patterns = _CONFIG_FILES + weight_files * need_weights + _TOKENIZER_FILES * own_tokenizer
        folder = _folder(model, revision, patterns)
        config = _read_config(folder)
        generation_path = folder / "generation_config.json"
        generation_config = _read_json(generation_path) if generation_path.is_file() else {}
        source_class = PickleSource if pickled else SafetensorsSource
        weights = source_class(folder) if need_weights else None
        if own_tokenizer:
            tokenizer_folder = _check_tokenizer(folder)
    return ModelFiles(name, config, generation_config, tokenizer_folder, weights if need_weights else None)


def sampling_defaults(
    own: Mapping[str, Any], source: str = "auto", override: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The generation config that sampling defaults come from.  own: the model's; source: "auto" (that), "vllm" (none)
    or a folder that holds another; override: entries to change.  Raises ValueError or FileNotFoundError if there is no
    such."""
    if not isinstance(source, str):
        raise ValueError(f"generation_config must be 'auto', 'vllm' or a folder, got {source!r}")
    if not isinstance(override, (Mapping, type(None))):
        raise ValueError(f"override_generation_config must be a dict, got {override!r}")
    reject_unknown(override or {}, [*RECOMMENDED, "eos_token_id"], "override_generation_config")
    if source == "vllm":
        own = {}
    elif source != "auto":
        path = Path(source).expanduser() / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"generation_config: there is no {path}; give 'auto', 'vllm' or a folder with one")
        own = _read_json(path)
    return {**own, **(override or {})}


def hub_folder(model: str, revision: str | None = None, patterns: list[str] | None = None) -> str:
    """The local snapshot of a hub model, downloaded as far as its cache lacks the files that `patterns` match.

    Raises FileNotFoundError or PermissionError, as `resolve` does.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    denied = f"the Hugging Face hub does not give access to {model!r}: ask for it at https://huggingface.co/{model}"
    patterns = patterns or [*_CONFIG_FILES, *_TOKENIZER_FILES, *_WEIGHT_FILES]
    try:
        return snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_DUPLICATES)
    except GatedRepoError as error:
        raise PermissionError(f"{denied}, then {log_in}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{model!r} is neither a folder here nor a public model on the Hugging Face hub; if it is private, {log_in}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{model!r} has no revision {revision!r} on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:
        # A snapshot known to be partial will do where it has what is needed; whoever reads it checks that.
        if snapshot := getattr(error, "snapshot_path", None):
            return snapshot
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{model!r} (revision {revision or 'main'}) is neither a folder here nor in the hub cache "
            f"{constants.HF_HUB_CACHE}, and {reason}"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(f"{denied}, then {log_in}") from error
        raise


def is_hub_id(reference: str) -> bool:
    """Whether a reference may be a model's on the hub; one of a folder here may look like that too."""
    return not reference.startswith((".", "/", "~")) and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference))


def _is_gguf(reference: str) -> bool:
    return reference.endswith(".gguf") and not Path(reference).expanduser().is_dir()


def _folder(reference: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder that a path or hub id names."""
    if not reference:  # which as a path would be the folder we are in
        raise ValueError(
            "model and tokenizer must not be empty: name a folder, a hub id or a .gguf file, or leave it out"
        )
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{reference!r} is a file; name the folder that holds config.json, or a .gguf file")
    if not is_hub_id(reference):
        raise FileNotFoundError(
            f"there is no folder {reference!r} (seen from {os.getcwd()}), and it is no hub id (org/name)"
        )
    return Path(hub_folder(reference, revision, patterns))


def _tokenizer_folder(reference: str) -> str:
    if _is_gguf(reference):
        return gguf_tokenizer(Path(reference).expanduser())
    return _check_tokenizer(_folder(reference, None, _CONFIG_FILES + _TOKENIZER_FILES))


def _check_tokenizer(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken")
    if not any(any(folder.glob(name)) for name in names):
        raise FileNotFoundError(f"no tokenizer files in {folder}; name another `tokenizer`, a folder or hub id")
    return str(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.is_file():
        return _read_json(path)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter; LoRA adapters are not supported, merge it into its base model"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        raise FileNotFoundError(f"no config.json in {folder}; to run a GGUF model name its file, such as {ggufs[0]}")
    raise FileNotFoundError(f"no config.json in {folder}: not a model in Hugging Face's format")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content
