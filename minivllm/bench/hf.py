"""The same requests through Hugging Face `generate`, for comparison."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

GROUP_SIZE = 16  # requests in a batch


def generate(
    folder: str,
    random_weights: bool,
    prompts: list[list[int]],
    output_lens: list[int],
    temperature: float,
    dtype: str,
    device: str,
) -> float:
    """Run the requests in left-padded batches of `GROUP_SIZE`; returns the seconds taken, after an untimed warm-up.

    A batch runs until its longest output is done, so requests are sorted by output length to waste as little as
    possible.  What a batch generates past a request's own length counts as nothing.
    """
    disable_progress_bar()
    torch_dtype = getattr(torch, dtype)
    if random_weights:
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    model = model.eval().to(device)
    _generate(model, [[1, 2, 3]] * 2, 4, temperature)
    requests = sorted(zip(output_lens, prompts, strict=True), key=lambda request: request[0], reverse=True)
    start = time.perf_counter()
    for i in tqdm(range(0, len(requests), GROUP_SIZE), desc="Hugging Face", unit="batch", disable=None, leave=False):
        group = requests[i : i + GROUP_SIZE]
        _generate(model, [prompt for _, prompt in group], group[0][0], temperature)
    return time.perf_counter() - start


@torch.inference_mode()
def _generate(model: torch.nn.Module, prompts: list[list[int]], num_tokens: int, temperature: float) -> None:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = (
        dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    )
    device = next(model.parameters()).device
    out = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0, **sampling
        ),
    )
    out = out[:, longest:].tolist()  # waits for the device
    assert all(len(tokens) == num_tokens for tokens in out)
