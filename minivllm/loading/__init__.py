"""From a model reference to files, and from files to parameters."""

from minivllm.loading.embedded import cache_dir, embedded_model
from minivllm.loading.gguf_file import GGUFSource, gguf_config, gguf_tokenizer
from minivllm.loading.resolve import ModelFiles, resolve, sampling_defaults
from minivllm.loading.weights import PickleSource, SafetensorsSource, WeightSource, fill_dummy, load_weights

__all__ = [
    "GGUFSource",
    "ModelFiles",
    "PickleSource",
    "SafetensorsSource",
    "WeightSource",
    "cache_dir",
    "embedded_model",
    "fill_dummy",
    "gguf_config",
    "gguf_tokenizer",
    "load_weights",
    "resolve",
    "sampling_defaults",
]
