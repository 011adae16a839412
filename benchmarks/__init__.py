"""What a Copilot is worth and what it costs, measured: `python -m benchmarks.<name>` from the repository's root."""
