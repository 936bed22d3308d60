"""Generate responses of named models to a set of prompts, and label them with gold scores.

--config FILE --out DIR [--set NAME=VALUE]

The same command again goes on where it was stopped. Afterwards pipelines/prepare_preferences.py builds the training
pairs and the four scenarios from DIR/labelled (data.source = "responses").

config ─► responses/<model>/*.jsonl ─Scorer─► labelled/*.jsonl ─► manifest.json ─► prepare_preferences.py
"""

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from pipelines.command import main as command
from pipelines.driver import on_a_terminal
from rm_robust.cluster.session import connect_to_ray
from rm_robust.cluster.terminal import Terminal
from rm_robust.cluster.workers import quieten_libraries
from rm_robust.config.loading import load_section
from rm_robust.responses.config import LabelsConfig, ResponsesConfig
from rm_robust.responses.generation import check_models, generate
from rm_robust.responses.labelling import label, num_left_out
from rm_robust.responses.response_files import (
    EXISTING,
    chunk_path,
    chunks_of,
    read_material,
    read_responses,
    write_existing,
)
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import RESOLVED_NAME, claim_run_dir, new_log, require_lasting
from rm_robust.scoring.checkpoint_scorer import ON_A_GPU, CheckpointScorer, require_device
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import Scorer

LIBRARIES = ("vllm", "torch", "transformers")


def main(options: argparse.Namespace) -> int:
    """Generate and label, and return the exit code.

    0: done; 2: wrong data or settings; 130 and 143: stopped with Ctrl-C or SIGTERM.
    """
    folder = options.out.absolute()

    def work(terminal: Terminal) -> None:
        quieten_libraries()
        require_lasting(options.out, f"--out {options.out}")
        config = load_section(options.config, options.overrides, ResponsesConfig)
        if config.labels is not None and config.labels.checkpoint is not None:
            fix = f'{ON_A_GPU}, or set labels.device = "cpu", or labels.url to a service that scores.'
            require_device(config.labels.device, f'labels.device = "{config.labels.device}"', fix=fix)
        claim_run_dir(folder, config)
        terminal.log_to(new_log(folder))
        run(config, folder)

    return on_a_terminal(work, is_verbose=options.verbose)


def run(config: ResponsesConfig, folder: Path) -> None:
    """Generate, label and write the manifest. Raises an RmRobustError for what a user can mend."""
    material = read_material(config)
    digest = hashlib.sha256("".join(prompt.prompt_id for prompt in material.prompts).encode()).hexdigest()
    chunks = chunks_of(material.prompts, config.chunk_prompts)
    check_models(config.models)
    write_existing(material, chunks, folder)
    distributions = packages_distributions()  # vLLM for CPUs has another name than vLLM
    model_names = [EXISTING, *(model.name for model in config.models)]
    with scorer_of(config.labels) as scorer:
        connect_to_ray()
        for model in config.models:
            generate(model, chunks, folder, config)
        manifest: dict[str, Any] = {
            "config": RESOLVED_NAME,
            "num_prompts": len(material.prompts),
            "num_repeated_prompts": material.num_repeated,
            "prompt_ids_sha256": digest,
            "responses": {name: counts_of(folder, name, len(chunks)) for name in model_names},
            "versions": {name: version(distributions[name][0]) for name in LIBRARIES},
        }
        if scorer is not None:
            checkpoint = label(model_names, len(chunks), folder, scorer)
            manifest["labels"] = {"checkpoint": checkpoint, "num_left_out": num_left_out(folder)}
    run_files.write_json(folder / "manifest.json", manifest)
    for name, counts in manifest["responses"].items():
        print(f"{name}: {counts}")
    print(f"{folder / 'manifest.json'}")
    if scorer is not None:
        labelled = folder / "labelled"
        print(
            'next: `rm-robust prepare-preferences` with data.source = "responses", '
            f'data.responses = ["{labelled}"] and data.unseen_models'
        )


def counts_of(folder: Path, model: str, num_chunks: int) -> dict[str, int | float]:
    """Return the counts of a model's responses that the manifest has."""
    responses = [
        response for number in range(num_chunks) for response in read_responses(chunk_path(folder, model, number))
    ]
    answered = [response for response in responses if response.completion is not None]
    return {
        "num_responses": len(answered),
        "num_prompts_too_long": len(responses) - len(answered),
        "num_truncated": sum(response.is_truncated for response in answered),
        "num_empty": sum(not (response.completion or "").strip() for response in answered),
        "mean_tokens": sum(response.num_tokens for response in answered) / max(1, len(answered)),
    }


@contextlib.contextmanager
def scorer_of(labels: LabelsConfig | None) -> Iterator[Scorer | None]:
    """Yield the scorer of the labels; None where there are no labels.

    It is loaded before anything is generated, so that a wrong path or address does not show hours later.
    """
    if labels is None:
        yield None
    elif labels.url is not None:
        with RewardClient(labels.url, model=labels.model) as client:
            yield client
    else:
        assert labels.checkpoint is not None
        yield CheckpointScorer(
            labels.checkpoint, device=labels.device, max_length_tokens=None, max_tokens_per_batch=8192
        )


if __name__ == "__main__":
    sys.exit(command(["generate-responses", *sys.argv[1:]]))
