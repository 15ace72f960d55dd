"""Compare the models in two folders on the first 200 prompts of a JSONL file: python compare.py ONE OTHER FACTS"""

import json
import sys
from itertools import islice

import torch

from interventions.checkpoint.reading import read_model, read_tokenizer

one, other, facts = sys.argv[1:]
tokenizer = read_tokenizer(one, {})
models = [read_model(folder, {"dtype": "auto"})[0].float().eval() for folder in (one, other)]
by_length: dict[int, list[list[int]]] = {}  # so that no prompt needs padding
with open(facts, encoding="utf-8") as lines:
    for line in islice(lines, 200):
        ids = tokenizer(json.loads(line)["prompt"]).input_ids
        by_length.setdefault(len(ids), []).append(ids)
moved, same = [], 0
with torch.no_grad():
    for prompts in map(torch.tensor, by_length.values()):
        before, after = (model(prompts).logits.flatten(1) for model in models)
        moved += ((after - before).abs().amax(dim=1) / (before.amax(dim=1) - before.amin(dim=1))).tolist()
        whole = torch.ones_like(prompts)
        answers = [m.generate(prompts, attention_mask=whole, max_new_tokens=5, do_sample=False) for m in models]
        same += int((answers[0] == answers[1]).all(dim=1).sum())
print(f"logits moved by {sum(moved) / len(moved):.2%} of their range, at most {max(moved):.2%}")
print(f"same greedy answer of 5 tokens: {same} of {len(moved)} prompts")
