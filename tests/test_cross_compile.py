"""Every kernel compiles for the GPUs people have, and fits their shared memory, on a machine without any."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "capability, shared_memory",
    [(80, 166912), (86, 101376), (89, 101376), (90, 232448)],
    ids=["sm_80", "sm_86", "sm_89", "sm_90"],
)
def test_kernels_compile_and_fit(capability, shared_memory):
    script = pathlib.Path(__file__).with_name("cross_compile.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, str(capability), str(shared_memory)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} >= {"_decode_kernel", "_reduce_kernel", "_prefill_kernel", "_rope_kv_kernel"}
    too_large = [k for k in kernels if k["shared"] > shared_memory]
    assert not too_large
