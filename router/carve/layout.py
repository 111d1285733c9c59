"""How a layer's neurons are divided: the options of a carving and what they mean for a given model. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from barista.errors import ConfigError

# What house-blend was measured with: 24 groups of neurons, an eighth of them shared, six sevenths of the rest chosen.
PREFERRED_GROUPS = 24


@dataclass(frozen=True, kw_only=True)
class CarveOptions:
    """What the user may choose. None: a default that follows from the model's FFN size (`Layout.of`).

    expert_size: neurons per expert. num_shared: experts' worth of neurons that always run. top_k: experts per token.
    text: UTF-8 text to calibrate on, like the text that the model will meet; None: the one in the package.
    max_tokens: calibration stops after so many tokens. force: replace an existing output directory.
    """

    expert_size: int | None = None
    num_shared: int | None = None
    top_k: int | None = None
    text: Path | None = None
    max_tokens: int = 12288
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """num_shared * expert_size neurons always run; num_experts routed experts, of which each token gets top_k."""

    expert_size: int
    num_shared: int
    num_experts: int
    top_k: int

    @property
    def shared_size(self) -> int:
        """Neurons of the shared experts together."""
        return self.num_shared * self.expert_size

    @property
    def intermediate_size(self) -> int:
        """Neurons of the dense FFN."""
        return self.shared_size + self.num_experts * self.expert_size

    @classmethod
    def of(cls, options: CarveOptions, intermediate_size: int) -> Layout:
        """The layout of an FFN of `intermediate_size` neurons. Raises ConfigError naming the value that cannot be."""
        if options.max_tokens < 1:
            raise ConfigError(
                f"--max-tokens {options.max_tokens} leaves nothing to calibrate on.", "Choose 512 or more."
            )
        size = options.expert_size if options.expert_size is not None else _default_size(intermediate_size)
        if size < 1 or intermediate_size % size:
            near = sorted(_divisors(intermediate_size), key=lambda divisor: abs(divisor - size))[:4]
            raise ConfigError(
                f"--expert-size {size} does not divide the FFN's {intermediate_size} neurons.",
                f"Near it are {', '.join(map(str, sorted(near)))}.",
            )
        groups = intermediate_size // size
        num_shared = options.num_shared if options.num_shared is not None else max(1, groups // 8)
        # The gate of Glm4Moe scores a group of experts by its best two, so there must be two.
        if not 1 <= num_shared <= groups - 2:
            raise ConfigError(
                f"--shared {num_shared} is not possible with {groups} groups of {size} neurons.",
                f"Choose 1 to {groups - 2}." if groups > 2 else "Choose a smaller --expert-size.",
            )
        num_experts = groups - num_shared
        top_k = options.top_k if options.top_k is not None else max(1, round(num_experts * 6 / 7))
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"--top-k {top_k} is not possible with {num_experts} routed experts.", f"Choose 1 to {num_experts}."
            )
        return cls(expert_size=size, num_shared=num_shared, num_experts=num_experts, top_k=top_k)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _default_size(intermediate_size: int) -> int:
    """The divisor that makes nearest to PREFERRED_GROUPS groups; whole cache lines and vector registers if possible."""
    divisors = [divisor for divisor in _divisors(intermediate_size) if intermediate_size // divisor >= 8]
    aligned = [divisor for divisor in divisors if divisor % 64 == 0]
    return min(aligned or divisors or [1], key=lambda divisor: abs(intermediate_size // divisor - PREFERRED_GROUPS))
