"""Transformer Copilot (arXiv 2505.16270) for the Hugging Face stack.

Wings of which each imports only from those before it: `model`, `pilot`, `generation`, `serving`, `training`, `ledger`,
`evaluation`, `cli`. From the fourth on they are loaded on first use: who only generates with a Copilot imports neither
vllm, trl nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from .generation.logits_processor import CopilotLogitsProcessor
from .model.configuration_copilot import CopilotConfig
from .model.modeling_copilot import CopilotModel
from .pilot.compatibility import check_pilot
from .pilot.copilot_for import copilot_for
from .version import __version__

if TYPE_CHECKING:
    from .evaluation.rectified_generation import RectifiedGeneration
    from .ledger.mistake_ledger import MistakeLedger
    from .training.callback import CopilotCallback
    from .training.folding import fold_copilot
    from .training.learner import CopilotLearner
    from .training.metrics import calibrate_on_rows
    from .training.mistake_log import MistakeLog
    from .training.seq2seq_trainer import CopilotSeq2SeqTrainer
    from .training.teacher_forced import score
    from .training.trainer import CopilotTrainer
    from .training.training_args import CopilotArguments, CopilotSeq2SeqConfig, CopilotSFTConfig

AutoConfig.register(CopilotConfig.model_type, CopilotConfig)
AutoModel.register(CopilotConfig, CopilotModel)

_ON_FIRST_USE = {
    "CopilotArguments": ".training.training_args",
    "CopilotCallback": ".training.callback",
    "CopilotLearner": ".training.learner",
    "CopilotSFTConfig": ".training.training_args",
    "CopilotSeq2SeqConfig": ".training.training_args",
    "CopilotSeq2SeqTrainer": ".training.seq2seq_trainer",
    "CopilotTrainer": ".training.trainer",
    "MistakeLedger": ".ledger.mistake_ledger",
    "MistakeLog": ".training.mistake_log",
    "RectifiedGeneration": ".evaluation.rectified_generation",
    "calibrate_on_rows": ".training.metrics",
    "fold_copilot": ".training.folding",
    "score": ".training.teacher_forced",
}

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
    "MistakeLedger",
    "MistakeLog",
    "RectifiedGeneration",
    "__version__",
    "calibrate_on_rows",
    "check_pilot",
    "copilot_for",
    "fold_copilot",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_FIRST_USE[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
