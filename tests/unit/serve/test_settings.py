"""Test what is refused before Ray starts: settings, the YAML for `serve deploy`, hosts and ports."""

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from rm_robust.errors import ConfigError
from serve.app import build, scorer_name
from serve.keys import KEYS_VARIABLE, new_key
from serve.launch import refuse_open_host, refuse_taken_port
from serve.settings import ModelSettings, ServiceLimits, ServiceSettings

YAML = Path(__file__).parents[3] / "serve" / "reward_model.yaml"


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.fixture
def deployed() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text()))


def test_the_yaml_is_one_that_serve_deploy_takes_and_listens_on_loopback(deployed: ServeDeploySchema) -> None:
    assert deployed.http_options.host == "127.0.0.1"
    assert [application.import_path for application in deployed.applications] == ["serve.app:build"]


def test_the_yamls_args_build_an_application(deployed: ServeDeploySchema) -> None:
    assert isinstance(build(deployed.applications[0].args), Application)


def test_the_yaml_repeats_the_defaults_it_shows(deployed: ServeDeploySchema) -> None:
    (model,) = deployed.applications[0].args["models"]
    chosen_fields = {"model_name", "checkpoint_dir", "num_cpus", "max_replicas"}
    defaults = ModelSettings(model_name="m", embedded_judge=True).model_dump()
    assert {name: model[name] for name in model.keys() - chosen_fields} == {
        name: defaults[name] for name in model.keys() - chosen_fields
    }
    limits = deployed.applications[0].args["limits"]
    assert limits == ServiceLimits().model_dump()


def test_the_yamls_swap_names_the_deployment_and_checkpoint_of_its_model(deployed: ServeDeploySchema) -> None:
    (model,) = deployed.applications[0].args["models"]
    (scorer,) = deployed.applications[0].deployments
    assert scorer.name == scorer_name(ModelSettings.model_validate(model))
    assert scorer.user_config == {"checkpoint_dir": model["checkpoint_dir"], "generation": 1}


JUDGE = {"model_name": "m", "embedded_judge": True}
TWO = [JUDGE, {"model_name": "n", "embedded_judge": True}]
WRONG_ARGS: list[tuple[dict[str, Any], str]] = [
    ({"models": [{"model_name": "m"}]}, "either checkpoint_dir or embedded_judge"),
    ({"models": [JUDGE | {"checkpoint_dir": "/x"}]}, "either checkpoint_dir or embedded_judge"),
    ({"models": [JUDGE | {"device": "cuda"}]}, "num_gpus > 0 go together"),
    ({"models": [JUDGE | {"num_gpus": 1}]}, "num_gpus > 0 go together"),
    ({"models": [JUDGE | {"num_replicas": 3, "max_replicas": 2}]}, "max_replicas = 2 is less than num_replicas = 3"),
    ({"models": [JUDGE], "insecure_no_auth": True, "api_keys": [new_key("a")[1]]}, "set one of them"),
    ({"models": [JUDGE], "api_keys": [{"name": "a", "sha256": "x"}]}, "api_keys.0.sha256: String should match"),
    ({"models": [JUDGE]}, "'m' has no keys"),
    ({"models": []}, "models: Tuple should have at least 1 item"),
    ({"models": [JUDGE, JUDGE]}, "model names must differ, these do not: m"),
    ({"models": TWO, "ensembles": [{"model_name": "m", "members": ["m", "n"]}]}, "model names must differ"),
    (
        {"models": TWO, "ensembles": [{"model_name": "e", "members": ["m", "x"]}]},
        "the members of e must be different models",
    ),
    (
        {"models": TWO, "ensembles": [{"model_name": "e", "members": ["m", "m"]}]},
        "the members of e must be different models",
    ),
    (
        {"models": TWO, "ensembles": [{"model_name": "e", "members": ["m", "n"], "aggregation": "max"}]},
        "ensembles.0.aggregation: Input should be 'mean'",
    ),
    ({"models": [{"embedded_judge": True}]}, "models.0.model_name: Field required"),
    ({"models": [{"model_name": "a b", "embedded_judge": True}]}, "models.0.model_name: String should match"),
    ({"models": [JUDGE | {"sigmoid": True}]}, "models.0.sigmoid: Extra inputs"),
    ({"models": [JUDGE], "limits": {"max_body_bytes": 0}}, "limits.max_body_bytes: Input should be greater"),
]


@pytest.mark.parametrize(("args", "message"), WRONG_ARGS)
def test_args_that_cannot_work_are_a_config_error_that_names_them(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(args)


def test_keys_that_the_args_leave_out_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f'a = {{ sha256 = "{new_key("a")[1].sha256}" }}')
    assert isinstance(build({"models": [JUDGE]}), Application)


def test_settings_are_frozen() -> None:
    settings = ServiceSettings.model_validate({"models": [JUDGE]})
    with pytest.raises(ValidationError):
        settings.num_fronts = 2  # type: ignore[misc]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", ""])
def test_a_host_that_others_can_reach_is_for_scorers_with_keys(host: str) -> None:
    settings = ServiceSettings.model_validate({"models": [JUDGE], "insecure_no_auth": True})
    with pytest.raises(ConfigError, match=f"without keys.*{host!r}"):
        refuse_open_host(host, settings)
    refuse_open_host(host, ServiceSettings.model_validate({"models": [JUDGE], "api_keys": [new_key("a")[1]]}))


def test_a_port_that_is_taken_is_refused_with_its_number() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 cannot be used"):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)


def test_a_service_without_keys_is_refused_behind_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_this_machine = {"models": [JUDGE], "insecure_no_auth": True}
    assert isinstance(build(open_to_this_machine), Application)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="every client look like one of this machine"):
        build(open_to_this_machine)
