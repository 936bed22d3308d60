"""Sample n answers to each prompt, and keep the one that the reward model scores highest (best of n).

    .venv/bin/python examples/05_best_of_n.py [RUN_DIR]

`make demo` makes the default run, runs/tiny_cpu; the script takes half a minute. You see what the judge, who knows the
right answers, gives the best of 1, 2, 4, 8 and 16. Where more choice no longer helps, the reward model's errors win.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm_robust import RewardModel
from rm_robust.data.world.gold_judge import gold_score

NUM_PROMPTS, N = 64, 16

run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny_cpu")
reward_model = RewardModel.load(run_dir)
policy = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints" / "sft")
tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoints" / "sft", padding_side="left")
lines = (run_dir / "world" / "rloo_prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]
prompts = [json.loads(line)["prompt"] for line in lines]
torch.manual_seed(0)
turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
ids = policy.generate(**inputs, do_sample=True, num_return_sequences=N, max_new_tokens=48)
completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
ranked = []  # for each prompt, the pairs (score, gold score) of its completions
for index, prompt in enumerate(prompts):
    own = completions[index * N : (index + 1) * N]
    gold_scores = [gold_score(prompt, completion) for completion in own]
    ranked.append(list(zip(reward_model.score(prompt, own), gold_scores, strict=True)))
for n in (1, 2, 4, 8, 16):
    print(f"best of {n:2}: gold score {fmean(max(pairs[:n])[1] for pairs in ranked):.3f}")
