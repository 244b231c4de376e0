"""Complete a few prompts: python examples/generate.py"""

from minivllm import LLM, SamplingParams

prompts = [
    "1, 2, 3, 4, 5,",
    "The best way to learn a language is to",
    "Once upon a time, there was a little fox who",
]
llm = LLM()  # the embedded SmolLM2-135M-Instruct; or a folder, a hub id, a .gguf file
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
for output in outputs:
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
