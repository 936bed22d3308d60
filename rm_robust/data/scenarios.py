"""Build the four scenarios, and the training set, from named models' responses with gold scores. Pure.

The sets are those of the paper (appendix B):

    train              training prompts, 2 random of a prompt's 4 training-model responses, chosen / rejected by gold
    in_domain          same prompts, the other 2
    prompt_disjoint    validation prompts, all training-model responses, ranked
    response_disjoint  training prompts, all unseen-model responses, ranked
    mutual_disjoint    validation prompts, all unseen-model responses, ranked

A prompt that cannot be in its first set (train or prompt_disjoint) is in none, so in_domain and response_disjoint hold
only prompts that the model is trained on. Disjointness is by prompt text and by response model (not by response text),
and is checked.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass

from rm_robust.data.records import ConversationGroup, NamedResponse
from rm_robust.errors import DataError

SCENARIOS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")
RESPONSES_PER_PROMPT = 4


@dataclass(frozen=True)
class Scenarios:
    """The five sets by name, and how many prompts, pairs or rankings were left out, by reason."""

    sets: dict[str, list[ConversationGroup]]
    dropped: dict[str, int]


def build_scenarios(
    responses: list[NamedResponse], *, unseen_models: set[str], validation_prompt_ids: set[str], seed: int
) -> Scenarios:
    """Build and check all five sets.

    Raises DataError when a set is empty or not disjoint, or when two prompts have the same id.
    """
    dropped: Counter[str] = Counter()
    by_prompt = _group_by_prompt(responses, dropped)
    sets: dict[str, list[ConversationGroup]] = {
        name: [] for name in ("train", "in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")
    }
    for prompt_id in sorted(by_prompt):
        seen = sorted((r for r in by_prompt[prompt_id] if r.model not in unseen_models), key=lambda r: r.model)
        unseen = sorted((r for r in by_prompt[prompt_id] if r.model in unseen_models), key=lambda r: r.model)
        is_validation = prompt_id in validation_prompt_ids
        if len(seen) < RESPONSES_PER_PROMPT:
            dropped["prompts with fewer than 4 training-model responses"] += 1
            continue
        if _has_repeats(seen):
            dropped["prompts with identical training-model responses"] += 1
            continue
        order = random.Random(f"{seed}:{prompt_id}").sample(seen, RESPONSES_PER_PROMPT)
        if is_validation:
            sets["prompt_disjoint"].append(_ranked(prompt_id, seen))
        elif _is_tied(order[:2]):
            dropped["prompts with tied gold scores in the training pair"] += 1
            continue
        else:
            sets["train"].append(_pair(prompt_id, order[:2]))
            if _is_tied(order[2:]):
                dropped["in-domain pairs with tied gold scores"] += 1
            else:
                sets["in_domain"].append(_pair(prompt_id, order[2:]))
        if len(unseen) < 2:
            dropped["unseen-model rankings of fewer than 2 responses"] += 1
        elif _has_repeats(unseen):
            dropped["unseen-model rankings with identical responses"] += 1
        else:
            sets["mutual_disjoint" if is_validation else "response_disjoint"].append(_ranked(prompt_id, unseen))
    check_disjoint(sets, unseen_models)
    return Scenarios(sets, dict(dropped))


def choose_validation_prompts(responses: list[NamedResponse], *, fraction: float, seed: int) -> set[str]:
    """Return the ids of a random `fraction` of the prompts. The same seed gives the same prompts."""
    prompt_ids = sorted({r.prompt_id for r in responses})
    return set(random.Random(seed).sample(prompt_ids, max(1, round(fraction * len(prompt_ids)))))


def check_disjoint(sets: dict[str, list[ConversationGroup]], unseen_models: set[str]) -> None:
    """Raise DataError for an empty set, a shared prompt or a response model on the wrong side of the split."""
    for name, groups in sets.items():
        if not groups:
            raise DataError(
                f"Scenario {name!r} is empty: check unseen_models {sorted(unseen_models)} and the number of responses "
                "per prompt."
            )
    prompts = {name: {_text(group) for group in groups} for name, groups in sets.items()}
    for name in ("prompt_disjoint", "mutual_disjoint"):
        shared = prompts[name] & (prompts["train"] | prompts["in_domain"])
        if shared:
            raise DataError(
                f"{len(shared)} prompts of {name!r} are training prompts too, e.g. {sorted(shared)[0][:200]!r}."
            )
    for name, groups in sets.items():
        wants_unseen = name in ("response_disjoint", "mutual_disjoint")
        wrong = {model for group in groups for model in group.models if (model in unseen_models) != wants_unseen}
        if wrong:
            raise DataError(f"Response models {sorted(wrong)} are on the wrong side in {name!r}.")


def manifest(scenarios: Scenarios) -> dict[str, dict[str, object]]:
    """Return the counts, models and content hash of every set, and what was dropped."""
    described: dict[str, dict[str, object]] = {}
    for name, groups in scenarios.sets.items():
        digest = hashlib.sha256(
            "\n".join(json.dumps(asdict(group), sort_keys=True, ensure_ascii=False) for group in groups).encode()
        )
        described[name] = {
            "num_groups": len(groups),
            "num_completions": sum(len(group.completions) for group in groups),
            "models": sorted({model for group in groups for model in group.models}),
            "sha256": digest.hexdigest(),
        }
    return {**described, "dropped": {**scenarios.dropped}}


def _group_by_prompt(responses: list[NamedResponse], dropped: Counter[str]) -> dict[str, list[NamedResponse]]:
    by_prompt: dict[str, list[NamedResponse]] = {}
    for response in responses:
        group = by_prompt.setdefault(response.prompt_id, [])
        if group and group[0].prompt != response.prompt:
            raise DataError(
                f"Prompt id {response.prompt_id!r} names two prompts: {group[0].prompt!r} and {response.prompt!r}. "
                "Give each its own id."
            )
        group.append(response)
    first_id: dict[str, str] = {}
    for prompt_id in sorted(by_prompt):
        text = json.dumps(by_prompt[prompt_id][0].prompt, sort_keys=True)
        if first_id.setdefault(text, prompt_id) != prompt_id:
            del by_prompt[prompt_id]
            dropped["duplicate prompts"] += 1
    return by_prompt


def _has_repeats(responses: list[NamedResponse]) -> bool:
    return len({r.completion for r in responses}) < len(responses)


def _is_tied(pair: list[NamedResponse]) -> bool:
    return pair[0].gold_score == pair[1].gold_score


def _pair(prompt_id: str, pair: list[NamedResponse]) -> ConversationGroup:
    better, worse = sorted(pair, key=lambda r: -r.gold_score)
    return ConversationGroup(
        prompt_id, better.prompt, [better.completion, worse.completion], [1.0, 0.0], [better.model, worse.model], None
    )


def _ranked(prompt_id: str, responses: list[NamedResponse]) -> ConversationGroup:
    completions, gold_scores = [r.completion for r in responses], [r.gold_score for r in responses]
    return ConversationGroup(
        prompt_id, responses[0].prompt, completions, gold_scores, [r.model for r in responses], None
    )


def _text(group: ConversationGroup) -> str:
    return json.dumps(group.prompt, sort_keys=True)
