"""`hf-copilot`: the command line."""
