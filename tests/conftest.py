"""No network, quiet libraries, and the tiny Pilot that most tests share."""

import gc
import os
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve beside another busy process
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # of 2 cores; more than there are cores is far slower
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the scripts that tests run
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read once, on import

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from tiny import tiny_pilot, tiny_tokenizer
from torch.optim.optimizer import _global_optimizer_pre_hooks as optimizer_hooks

torch.set_num_threads(THREADS)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# The same cases in every run of the suite; others with `--hypothesis-profile long --hypothesis-seed SEED`, which
# prints what fails as it was drawn: making it smaller takes longer than all the rest.
CASES = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True, "database": None}
settings.register_profile("suite", max_examples=50, derandomize=True, **CASES)
settings.register_profile("long", max_examples=2000, phases=[Phase.explicit, Phase.generate], **CASES)
settings.load_profile("suite")


def pytest_configure(config):
    """What is an error here, since it will go, is one in the scripts that tests run too."""
    rules = [rule for rule in config.getini("filterwarnings") if rule.endswith(":FutureWarning")]
    os.environ["PYTHONWARNINGS"] = ",".join(rules)


def pytest_collection_finish():
    """All is imported, and stays: `train()` collects garbage, and would go through a million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_optimizer_is_watched_afterwards():
    """A hook that a test leaves would act in every later test of its process."""
    before = list(optimizer_hooks.values())
    yield
    assert list(optimizer_hooks.values()) == before


@pytest.fixture
def pilot():
    return tiny_pilot().eval()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
