"""The version of hf_copilot, as installed."""

from importlib.metadata import version

__version__ = version("hf_copilot")
