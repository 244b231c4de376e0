"""Checkpoint tensors into model parameters: every parameter written once, every tensor used or explicitly ignored."""

import json
import pickle
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minivllm.parallel import Parts


class WeightSource(Protocol):
    """The tensors of a checkpoint under their Hugging Face names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading any."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, on the CPU, read as it is asked for."""


Entries = Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]  # name, shape, what reads the tensor


class _Files(ABC):
    """The tensors of several files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            for name, shape, _ in self._entries(path):
                if name in self._shapes:
                    raise ValueError(f"tensor {name} is in {path} and in another file beside it; delete one")
                self._shapes[name] = shape

    @abstractmethod
    def _entries(self, path: Path) -> Entries:
        """What a file holds."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for path in self._files:
            for name, _, read in self._entries(path):
                yield name, read()

    def read(self, wanted: str) -> torch.Tensor | None:
        """One tensor, or None if there is no such."""
        if wanted not in self._shapes:
            return None
        return next(read() for path in self._files for name, _, read in self._entries(path) if name == wanted)


class SafetensorsSource(_Files):
    """A folder's model.safetensors, the shards of its index, or whatever other *.safetensors files it has.

    Raises FileNotFoundError for a missing shard or no weights at all; ValueError for a damaged file, for a name that
    two files hold, and for a folder with pickled weights only.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(_weight_files(Path(folder), "model", ".safetensors"))

    def _entries(self, path: Path) -> Entries:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                # Memory-mapped: a tensor is read where it is copied to, not before.
                yield name, tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)


class PickleSource(_Files):
    """A folder's pytorch_model.bin, or the shards of its index, read without running what code a pickle may hold.

    Raises FileNotFoundError for a missing shard or no such weights; ValueError for a file that is damaged or holds
    anything but tensors, and for a name that two files hold.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(_weight_files(Path(folder), "pytorch_model", ".bin"))

    def _entries(self, path: Path) -> Entries:
        for name, tensor in _unpickle(path).items():
            yield name, tuple(tensor.shape), lambda tensor=tensor: tensor  # type: ignore[misc]


def has_own_head(source: WeightSource | None) -> bool:
    """Whether a checkpoint has an LM head that is another than its embedding."""
    if not isinstance(source, _Files):
        return False
    head, embedding = source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
    if head is None or embedding is None or head.shape != embedding.shape:
        return False  # loading says what is wrong with it
    return not torch.equal(head, embedding.to(head.dtype))


@torch.no_grad()
def load_weights(
    targets: Mapping[str, torch.Tensor | Parts],
    source: WeightSource,
    ignored: Callable[[str], bool] = lambda name: False,
    progress: bool = False,
) -> None:
    """Copy each checkpoint tensor into its target: a parameter or a view of one, on any device and of any float type;
    or only parts of it, each into its view.

    Tensors without a target are skipped where `ignored(name)`. Raises ValueError, before anything is written, that
    names the tensors which are missing, unknown or of another shape; and for a tensor that comes twice or is quantized.
    """
    shapes = source.shapes()
    _check(targets, shapes, ignored)
    unwritten = set(targets)
    # The line appears only when loading takes long enough to wonder, and on a terminal: it would fill a log.
    for name, tensor in tqdm(
        source.tensors(),
        total=len(shapes),
        desc="loading weights",
        unit="tensor",
        delay=2,
        disable=None if progress else True,
    ):
        target = targets.get(name)
        if target is None:
            continue
        if name not in unwritten:
            raise ValueError(f"tensor {name} comes twice in the checkpoint")
        assert tuple(tensor.shape) == tuple(target.shape), f"{name} is not of the shape its source announced"
        for index, view in target.pieces if isinstance(target, Parts) else [((slice(None),) * tensor.ndim, target)]:
            part = tensor[index]
            if part.dtype != view.dtype:
                if not part.is_floating_point() or part.dtype.itemsize == 1:
                    raise ValueError(f"tensor {name} is {part.dtype}: quantized checkpoints are not supported")
                part = part.to(view.device)  # convert there: copy_ between devices converts on the CPU
            view.copy_(part)
        unwritten.remove(name)
    assert not unwritten, f"announced, but not in the checkpoint: {_few(unwritten)}"


@torch.no_grad()
def fill_dummy(targets: Mapping[str, torch.Tensor | Parts], seed: int) -> None:
    """Draw every target uniformly from ±1e-3, on its own device: the same numbers for the same seed, name and shape."""
    for name, target in targets.items():
        views = [view for _, view in target.pieces] if isinstance(target, Parts) else [target]
        for number, view in enumerate(views):
            generator = torch.Generator(view.device).manual_seed(seed + zlib.crc32(f"{name} {number}".encode()))
            view.uniform_(-1e-3, 1e-3, generator=generator)


def _check(
    targets: Mapping[str, torch.Tensor | Parts], shapes: dict[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> None:
    misshapen = [
        f"{name} is {list(shapes[name])} in the checkpoint and {list(target.shape)} in the model"
        for name, target in targets.items()
        if name in shapes and shapes[name] != tuple(target.shape)
    ]
    unknown = [name for name in shapes if name not in targets and not ignored(name)]
    missing = [name for name in targets if name not in shapes]
    problems = []
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape (not the weights of this config.json?): {_few(misshapen)}")
    if missing:
        problems.append(f"{len(missing)} missing (an incomplete checkpoint, or another architecture?): {_few(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} that the model has no place for (another architecture?): {_few(unknown)}")
    if problems:
        raise ValueError("the checkpoint does not fit the model. Tensors: " + "; ".join(problems))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    single, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of {suffix} files; fetch it again ({error})") from error
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{index.name} lists {file.name}, which is not in {folder}; fetch it")
        return files
    loose = sorted(folder.glob(f"*{suffix}")) if suffix == ".safetensors" else []
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if not loose and pickled and suffix == ".safetensors":
        raise ValueError(
            f"{folder} has only pickled weights ({_few(pickled)}), which can run code when loaded and are refused; "
            "save the model as safetensors, take a revision that has them, or ask for pytorch_model*.bin with "
            "load_format='pt', which reads tensors and nothing else"
        )
    if not loose:
        raise FileNotFoundError(f"no {'*' if suffix == '.safetensors' else stem}{suffix} weights in {folder}")
    return loose


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors and is refused ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by name: not a model's state")
    return tensors


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut short or damaged, or only a git-lfs pointer; fetch it again ({error})"
        ) from error
