"""A Copilot in an engine that batches requests as they come. `hf_copilot.serving.vllm` is loaded by vLLM alone."""
