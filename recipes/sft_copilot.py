"""Fine-tune a Pilot with a Copilot on any question-answer data: `hf-copilot sft`, as a script.

    python recipes/sft_copilot.py --config recipes/mawps_tiny.yaml --dataset_name DIR/mawps
    python recipes/sft_copilot.py --config recipes/gsm8k_qwen2.5_0.5b.yaml

`dataset_name` is a Hub id, a JSON Lines file (`.jsonl`, `.jsonl.gz`) or a folder with `train`, `test` files of that
kind. The Pilot is `model_name_or_path` (a Hub id or a folder), or built from scratch with `from_config`.
"""

import sys

from hf_copilot.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["sft", *sys.argv[1:]]))
