"""The paper's tables, a row at a time: train a Pilot with a Copilot, measure both, put them beside the paper's."""
