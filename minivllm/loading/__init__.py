"""From a model reference to files, and from files to parameters."""

from minivllm.loading.embedded import embedded_model
from minivllm.loading.resolve import find_model

__all__ = ["embedded_model", "find_model"]
