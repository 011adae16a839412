"""What a Copilot is: its configuration, its mathematics, its network. Knows no Pilot."""
