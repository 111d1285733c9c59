"""What the options of a carving mean for a given FFN."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from router.carve.layout import CarveOptions, Layout


@given(intermediate_size=st.integers(8, 20_000))
def test_the_defaults_divide_every_ffn_without_rest(intermediate_size):
    layout = Layout.of(CarveOptions(), intermediate_size)
    assert layout.intermediate_size == intermediate_size
    assert 1 <= layout.top_k <= layout.num_experts
    assert layout.num_experts >= 2
    assert layout.num_shared >= 1


def test_the_defaults_for_smollm2_are_the_house_blend():
    assert Layout.of(CarveOptions(), 1536) == Layout(expert_size=64, num_shared=3, num_experts=21, top_k=18)


@pytest.mark.parametrize("intermediate_size", [4864, 8960, 14336, 18944])
def test_real_ffns_get_experts_that_fill_cache_lines(intermediate_size):
    layout = Layout.of(CarveOptions(), intermediate_size)
    assert layout.expert_size % 64 == 0
    assert 12 <= layout.num_experts + layout.num_shared <= 48


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            CarveOptions(expert_size=100),
            "--expert-size 100 does not divide the FFN's 1536 neurons. Near it are 48, 64, 96, 128",
        ),
        (CarveOptions(expert_size=0), "--expert-size 0"),
        (CarveOptions(expert_size=768), "Choose a smaller --expert-size"),
        (CarveOptions(expert_size=64, num_shared=23), "--shared 23 is not possible with 24 groups"),
        (CarveOptions(expert_size=64, num_shared=0), "Choose 1 to 22"),
        (CarveOptions(expert_size=64, top_k=22), "--top-k 22 is not possible with 21 routed experts. Choose 1 to 21"),
        (CarveOptions(max_tokens=0), "--max-tokens 0"),
    ],
)
def test_an_impossible_option_is_named_with_a_remedy(options, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        Layout.of(options, 1536)
