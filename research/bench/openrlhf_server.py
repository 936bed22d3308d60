"""Serve a reward model with the logic of OpenRLHF's server, without its DeepSpeed and flash-attn imports.

    python -m research.bench.openrlhf_server --checkpoint DIR --port 5000 --threads 1

The logic is that of openrlhf/cli/serve_rm.py. It was compared with a copy that names no commit; the handler and the
reply are those of commit 3c3be623. Kept from the original: the handler is `async def` and runs the forward pass inside
the event loop; each request is one static batch (with batch_size None, all its queries); padding is on the left;
attention mask and position ids are passed for every batch (models/model.py, RewardModel.forward); there are two log
lines per request, and uvicorn's access log. Changed: float32 and sdpa, because CPUs have no FlashAttention 2, and the
number of threads is an argument.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_LENGTH_TOKENS = 2048
logger = logging.getLogger("openrlhf_server")


class RewardModelProxy:
    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(
            str(checkpoint), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.config.use_cache = False
        self.tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), padding_side="left")
        self.batch_size: int | None = None

    def get_reward(self, queries: list[str]) -> list[float]:
        batch_size = len(queries) if self.batch_size is None else self.batch_size
        logger.info(f"queries[0]: {queries[0]}")
        scores: list[float] = []
        with torch.no_grad():
            for start in range(0, len(queries), batch_size):
                texts = queries[start : min(len(queries), start + batch_size)]
                inputs = self.tokenizer(
                    texts,
                    return_tensors="pt",
                    add_special_tokens=False,
                    max_length=MAX_LENGTH_TOKENS,
                    padding=True,
                    truncation=True,
                )
                scores.extend(self.forward(inputs["input_ids"], inputs["attention_mask"]).tolist())
        return scores

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        position_ids = attention_mask.long().cumsum(-1) - 1
        position_ids.masked_fill_(attention_mask == 0, 1)
        outputs = self.model.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        values = self.model.score(outputs["last_hidden_state"]).squeeze(-1)
        eos_indices = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
        rewards: Tensor = values.gather(dim=1, index=eos_indices).squeeze(1)
        return rewards


def create_app(reward_model: RewardModelProxy) -> FastAPI:
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        data: dict[str, Any] = await request.json()
        rewards = reward_model.get_reward(data["query"])
        result = {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}
        logger.info(f"Sent JSON: {result}")
        return JSONResponse(result)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="torch's threads for one forward pass")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(
        level=logging.INFO,
        format="%(levelname)s %(asctime)s %(filename)s:%(lineno)d] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    uvicorn.run(
        create_app(RewardModelProxy(arguments.checkpoint)), host="127.0.0.1", port=arguments.port, log_level="info"
    )


if __name__ == "__main__":
    main()
