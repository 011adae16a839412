"""Pilot and Pilot + Copilot side by side: likelihoods, generated answers, paired intervals."""
