"""pip's settings become uv's: the same indexes, folders, certificate and proxy, unless uv has its own setting."""

from requirements.pip_settings import pip_settings, shell_commands


def test_the_environment_overrides_pips_install_section_and_that_overrides_the_global_one() -> None:
    lines = [
        ":env:.cert='/env.pem'",
        "global.cert='/global.pem'",
        "global.index-url='https://global.test/simple'",
        "install.index-url='https://install.test/simple'",
        "global.timeout='10'",
        "list.timeout='20'",
    ]
    assert pip_settings(lines) == {"cert": "/env.pem", "index-url": "https://install.test/simple", "timeout": "10"}


def test_several_values_are_separated_as_uv_wants_them() -> None:
    settings = pip_settings(
        [r"global.extra-index-url='\nhttps://a.test/simple\nhttps://b.test/simple'", "global.find-links='/one /two'"]
    )
    assert shell_commands(settings, {}) == [
        "export UV_INDEX='https://a.test/simple https://b.test/simple'",
        "export UV_FIND_LINKS=/one,/two",
        "export UV_INDEX_STRATEGY=unsafe-best-match",
    ]


def test_a_setting_that_uv_already_has_stays() -> None:
    settings = {"index-url": "https://pip.test/simple", "extra-index-url": "https://b.test/simple"}
    environment = {"UV_DEFAULT_INDEX": "https://uv.test/simple", "UV_INDEX_STRATEGY": "first-index"}
    assert shell_commands(settings, environment) == ["export UV_INDEX=https://b.test/simple"]


def test_an_empty_variable_switches_a_setting_off() -> None:
    settings = pip_settings([":env:.extra-index-url=''", "global.extra-index-url='https://a.test/simple'"])
    assert shell_commands(settings, {}) == []


def test_a_value_cannot_run_a_command_of_the_shell() -> None:
    assert shell_commands({"cert": "/a$(touch /b).pem"}, {}) == ["export SSL_CERT_FILE='/a$(touch /b).pem'"]


def test_pips_no_index_becomes_an_option() -> None:
    assert shell_commands({"no-index": "true"}, {}) == ["uv_options+=(--no-index)"]
    assert shell_commands({"no-index": "false"}, {}) == []
