"""An OpenAI-compatible server on top of `AsyncLLM` (extra `server`)."""
