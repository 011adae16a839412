"""What is read of a Pilot, and which Pilot a Copilot fits."""
