"""Algorithm 1: the Mistake Log, and the Copilot that learns from it beside the Pilot."""
