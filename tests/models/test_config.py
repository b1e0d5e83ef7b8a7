import pytest

from jaxrl_eff.models import LMConfig, Rope


def tiny(**changes):
    sizes = dict(vocab=11, layers=2, width=8, heads=2, kv_heads=1, head_dim=4, ffn=12)
    return LMConfig(**(sizes | changes))


def test_a_configuration_is_static_data():
    assert hash(tiny()) == hash(tiny()) and tiny() == tiny()
    assert tiny().replace(layers=3, windowed=()).windowed == (False,) * 3


def test_a_window_without_a_pattern_is_for_every_layer():
    assert tiny(window=4).windowed == (True, True)
    assert tiny().windowed == (False, False)


def test_query_scale_defaults_to_the_head_dimension():
    assert tiny().score_scale == 0.5
    assert tiny(query_scale=0.1).score_scale == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        dict(act="relu"), dict(remat="some"), dict(head="reward"), dict(dtype="int8"),
        dict(kv_heads=3), dict(head_dim=5), dict(windowed=(True,), window=2),
        dict(windowed=(True, False)),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny(**changes)


def test_a_stretched_rope_needs_the_original_length():
    with pytest.raises(ValueError, match="original_length"):
        Rope(kind="yarn", factor=2.0)
    with pytest.raises(ValueError, match="dynamic"):
        Rope(kind="dynamic")
