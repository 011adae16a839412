"""Algorithm 2: the Copilot inside `model.generate`."""
