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
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from hf_copilot import CopilotLearner, CopilotLogitsProcessor, copilot_for


def train(pilot, optimizer, loader, learner, backward=torch.Tensor.backward, say=print):
    for step, batch in enumerate(loader):
        with learner.observe(batch):  # logs what the Pilot sees, thinks and gets wrong
            loss = pilot(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        learner.step(measure=step % 20 == 0)  # the Copilot's steps of this round, on every process
        if step % 20 == 0:
            say(step, {name: round(value, 4) for name, value in learner.pop_metrics().items()})


def train_with_accelerate(pilot, optimizer, loader, learner):
    accelerator = Accelerator()
    pilot, optimizer, loader = accelerator.prepare(pilot, optimizer, loader)
    learner.start(len(loader))  # anew, where the Pilot is now; the Copilot stays outside of `prepare`
    train(pilot, optimizer, loader, learner, accelerator.backward, accelerator.print)


def sums(count):
    pairs = [random.sample(range(100), 2) for _ in range(count)]
    return [{"question": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Pilot on the Hub or in a folder; without it a tiny one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--output", default="out/plain_loop")
    args = parser.parse_args()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else ByT5Tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = LlamaConfig(vocab_size=len(tokenizer), **shape, pad_token_id=0, eos_token_id=1)
    pilot = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32") if args.model else LlamaForCausalLM(tiny)
    rows = list(load_dataset("openai/gsm8k", "main", split="train")) if args.model else sums(8 * args.steps)

    def collate(rows):
        text = [row["question"] + row["answer"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(text, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, label in zip(rows, batch["labels"], strict=True):
            label[: len(tokenizer(row["question"], add_special_tokens=False)["input_ids"])] = -100
        return dict(batch.to(pilot.device))

    loader = torch.utils.data.DataLoader(rows[: 8 * args.steps], 8, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(pilot.to(PartialState().device).parameters(), lr=1e-5 if args.model else 1e-3)
    learner = CopilotLearner(copilot_for(pilot, tokenizer=tokenizer), pilot, len(loader), learning_rate=1e-3)
    (train_with_accelerate if args.accelerate else train)(pilot, optimizer, loader, learner)
    if not PartialState().is_main_process:
        return
    learner.exported().save_pretrained(args.output)
    prompt = tokenizer(rows[0]["question"], add_special_tokens=False, return_tensors="pt").to(learner.device)
    with CopilotLogitsProcessor(learner.copilot.eval(), pilot.eval()) as processor:
        text = pilot.generate(**prompt, max_new_tokens=64, logits_processor=[processor])
    print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
