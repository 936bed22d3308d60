"""DeepSpeed ignores keys that it does not know, so this test looks up ours in its own lists."""

import pytest

from rm_robust.training.engines.deepspeed import deepspeed_config

pytestmark = pytest.mark.slow


def test_every_key_is_one_that_deepspeed_reads() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = deepspeed_config(zero_stage=3, max_gradient_norm=0.25, cpu_offload=False)
    zero = config["zero_optimization"]
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(config) - {"zero_optimization"} <= known
    assert set(zero) <= {
        name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)
    }
    parsed = DeepSpeedConfig({**config})
    assert (parsed.gradient_clipping, parsed.managed_gradient_accumulation, parsed.zero_optimization_stage) == (
        0.25,
        False,
        3,
    )
    assert parsed.gradient_accumulation_steps == 1
