"""Does a Copilot help? Small Pilots on several tasks, alone and with Copilots; see README.md."""
