"""A Copilot in a training loop of your own: plain PyTorch, or Accelerate on any number of processes.

python recipes/plain_loop.py                              # a tiny Pilot learns sums, seconds on a CPU
accelerate launch recipes/plain_loop.py --accelerate
python recipes/plain_loop.py --model Qwen/Qwen2.5-0.5B    # GSM8K
"""

import argparse
import random

import torch
from accelerate import Accelerator, PartialState
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from hf_copilot import CopilotLearner, CopilotLogitsProcessor, copilot_for


def train(pilot, optimizer, loader, learner, accelerator=None):
    for step, batch in enumerate(loader):
        with learner.observe(batch):  # logs what the Pilot sees, thinks and gets wrong
            loss = pilot(**batch).loss
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        learner.step(measure=step % 20 == 0)  # the Copilot's steps of this round, on every process
        if step % 20 == 0:
            metrics = learner.pop_metrics()
            PartialState().print(step, {name: round(value, 4) for name, value in metrics.items()})


def train_with_accelerate(pilot, optimizer, loader, learner):
    accelerator = Accelerator()
    pilot, optimizer, loader = accelerator.prepare(pilot, optimizer, loader)
    learner.start(len(loader))  # anew, where the Pilot is now; the Copilot stays outside of `prepare`
    train(pilot, optimizer, loader, learner, accelerator)


def pretrained(name):
    """A Pilot from the Hub or a folder, its tokenizer, and rows of GSM8K."""
    rows = list(load_dataset("openai/gsm8k", "main", split="train"))
    return AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name), rows


def from_scratch(count):
    """A tiny Pilot that reads bytes, its tokenizer, and sums."""
    tokenizer = ByT5Tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    pairs = [random.sample(range(100), 2) for _ in range(count)]
    rows = [{"question": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in pairs]
    return LlamaForCausalLM(LlamaConfig(**shape, **tokens)), tokenizer, rows


def collate(rows, tokenizer, device):
    """A batch padded on the right, with labels on the answers."""
    texts = [row["question"] + row["answer"] + tokenizer.eos_token for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, label in zip(rows, batch["labels"], strict=True):
        label[: len(tokenizer(row["question"], add_special_tokens=False)["input_ids"])] = -100
    return dict(batch.to(device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Pilot on the Hub or in a folder; without it a tiny one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--output", default="out/plain_loop")
    args = parser.parse_args()
    set_seed(0)
    count = 8 * args.steps
    pilot, tokenizer, rows = pretrained(args.model) if args.model else from_scratch(count)
    pilot.to(PartialState().device)
    loader = DataLoader(rows[:count], 8, shuffle=True, collate_fn=lambda rows: collate(rows, tokenizer, pilot.device))
    optimizer = torch.optim.AdamW(pilot.parameters(), lr=1e-5 if args.model else 1e-3)
    learner = CopilotLearner(copilot_for(pilot, tokenizer=tokenizer), pilot, len(loader), learning_rate=1e-3)
    (train_with_accelerate if args.accelerate else train)(pilot, optimizer, loader, learner)
    if PartialState().is_main_process:
        learner.exported().save_pretrained(args.output)
        print(answer(pilot.eval(), learner.copilot.eval(), tokenizer, rows[0]["question"]))


def answer(pilot, copilot, tokenizer, question):
    inputs = tokenizer(question, add_special_tokens=False, return_tensors="pt").to(pilot.device)
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        ids = pilot.generate(**inputs, max_new_tokens=64, logits_processor=[processor])
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
