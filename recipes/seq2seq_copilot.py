"""Fine-tune an encoder-decoder (T5, FLAN-T5, BART, ...) with a Copilot: `hf-copilot seq2seq`, as a script.

    python recipes/seq2seq_copilot.py --config recipes/mawps_t5_tiny.yaml --dataset_name DIR/mawps
    python recipes/seq2seq_copilot.py --config recipes/gsm8k_flan_t5_small.yaml

Data and Pilot are given as to `sft_copilot.py`.
"""

import sys

from hf_copilot.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["seq2seq", *sys.argv[1:]]))
