"""Transformer Copilot (arXiv 2505.16270) for the Hugging Face stack."""

from transformers import AutoConfig, AutoModel

from .callback import CopilotCallback
from .compatibility import check_pilot
from .configuration_copilot import CopilotConfig
from .learner import CopilotLearner
from .logits_processor import CopilotLogitsProcessor
from .mistake_log import MistakeLog
from .modeling_copilot import CopilotModel
from .trainer import CopilotSeq2SeqTrainer, CopilotTrainer
from .training_args import CopilotArguments, CopilotSeq2SeqConfig, CopilotSFTConfig
from .version import __version__
from .weights import copilot_for

AutoConfig.register(CopilotConfig.model_type, CopilotConfig)
AutoModel.register(CopilotConfig, CopilotModel)

__all__ = [
    "CopilotArguments",
    "CopilotCallback",
    "CopilotConfig",
    "CopilotLearner",
    "CopilotLogitsProcessor",
    "CopilotModel",
    "CopilotSFTConfig",
    "CopilotSeq2SeqConfig",
    "CopilotSeq2SeqTrainer",
    "CopilotTrainer",
    "MistakeLog",
    "__version__",
    "check_pilot",
    "copilot_for",
]
