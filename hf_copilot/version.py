"""The version of hf_copilot, as installed, and the versions of transformers that its tests run with."""

from importlib.metadata import version

__version__ = version("hf_copilot")
TESTED_TRANSFORMERS = ("5.17.0", "5.24.0")  # the lowest and the newest, as .ci/*.txt pin them
