"""The operators of a model step, behind one interface: Triton on a GPU, plain torch on a CPU (and as the oracle in
tests).

Everything that depends on the device is here; layers and models are written once.
"""

from minivllm.backends.base import Backend


def make_backend(name: str) -> Backend:
    """The backend called `name`, "torch" or "triton"; its libraries are imported only now."""
    if name == "triton":
        from minivllm.backends.triton_backend import TritonBackend

        return TritonBackend()
    from minivllm.backends.torch_backend import TorchBackend

    return TorchBackend()


__all__ = ["Backend", "make_backend"]
