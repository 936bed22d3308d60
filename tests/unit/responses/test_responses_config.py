"""The configs in pipelines/configs/responses are valid, and wrong settings are refused by name."""

from pathlib import Path

import pytest

from rm_robust.config.loading import load_section
from rm_robust.errors import ConfigError
from rm_robust.responses.config import ResponsesConfig

RECIPES = sorted(Path("pipelines/configs/responses").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_section(path, [], ResponsesConfig).labels is not None


def test_the_papers_recipe_samples_as_the_released_code() -> None:
    sampling = load_section(Path("pipelines/configs/responses/paper.toml"), [], ResponsesConfig).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.8, 1.0, 512)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["prompts=[]", "existing=[]"], "nothing to respond to"),
        (['labels.url="http://x"'], "a checkpoint or a url, and not both"),
        (["sampling.max_new_tokens=128"], "leaves no room for a prompt"),
        (['models=[{name="a", path="x"}, {name="a", path="y"}]'], "names of their own"),
        (['models=[{name="_existing", path="x"}]'], "models"),
        (["sampling.temperature=0"], "sampling.temperature = 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_section(Path("pipelines/configs/responses/tiny.toml"), overrides, ResponsesConfig)
