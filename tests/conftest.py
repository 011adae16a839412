"""No network, quiet libraries, and the tiny Pilot that most tests share."""

import os
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve beside another busy process
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read once, on import

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny import tiny_pilot, tiny_tokenizer  # noqa: E402

torch.set_num_threads(2)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def pilot():
    return tiny_pilot().eval()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
