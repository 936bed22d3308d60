"""Score completions with a reward model that is served, over HTTP.

    make serve CHECKPOINT=runs/tiny_cpu/checkpoints/reward_model INSECURE_NO_AUTH=1     (in another terminal)
    .venv/bin/python examples/02_score_over_http.py [URL]

The service starts within half a minute, and the script takes a second. You see the scores of two prompts, one of them
a conversation, from one request, and the hash of the checkpoint that gave them. The client needs neither torch nor Ray:
the wheel alone (`make wheel`) is enough. A service with keys takes the key from RM_ROBUST_API_KEY. The demo's model
knows only its own toy world of such prompts; its scores of other text mean nothing.
"""

import sys

from rm_robust.scoring import RewardClient, ScoreInput

CONVERSATION = [
    {"role": "user", "content": "Today Mia bought a brown pear. Please tell me only the thing."},
    {"role": "assistant", "content": "The answer is pear."},
    {"role": "user", "content": "Today Tom found a red horse. Please tell me only the thing."},
]
INPUTS = [
    ScoreInput(prompt=CONVERSATION[0]["content"], completions=["The answer is pear.", "It is brown."]),
    ScoreInput(prompt=CONVERSATION, completions=["The answer is horse.", "The answer is pear."]),
]

with RewardClient(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000") as client:
    reply = client.score(INPUTS)
print(reply.model, reply.checkpoint)
for item, scores in zip(INPUTS, reply.scores, strict=True):
    for completion, score in zip(item.completions, scores, strict=True):
        print(f"{score:8.3f}  {completion}")
