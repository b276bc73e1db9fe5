"""optimum traces Phi with a cache of all query heads, which fails with fewer KV heads: this gives it the right one."""

from __future__ import annotations

from optimum.utils import DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator, NormalizedTextConfig


def has_kv_heads(export_config: type) -> None:
    """Make an export configuration read `num_key_value_heads` and `head_dim`."""
    export_config.DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator)
    export_config.DUMMY_PKV_GENERATOR_CLASS = MistralDummyPastKeyValuesGenerator
    export_config.NORMALIZED_CONFIG_CLASS = NormalizedTextConfig.with_args(
        num_key_value_heads="num_key_value_heads", allow_new=True
    )
