"""Rotary position embeddings: the angles. The rotation itself is a kernel."""

from __future__ import annotations

import math

import torch

from router.model.spec import RopeSpec


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """[dim / 2] float32: radians per position of each pair."""
    plain = 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    if spec.scaling == "llama3":
        return _llama3(plain, spec)
    if spec.scaling == "yarn":
        return _yarn(spec)
    return plain


def cos_sin_table(spec: RopeSpec, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [num_positions, dim / 2] float32."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse_frequencies(spec)
    return angles.cos() * spec.cos_sin_scale, angles.sin() * spec.cos_sin_scale


def _llama3(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    low, high = spec.low_freq_factor, spec.high_freq_factor
    blend = (spec.original_max_len / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / spec.factor + blend * plain
    scaled = torch.where(wavelength > spec.original_max_len / low, plain / spec.factor, plain)
    between = (wavelength >= spec.original_max_len / high) & (wavelength <= spec.original_max_len / low)
    return torch.where(between, blended, scaled)


def _yarn(spec: RopeSpec) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): dimensions that rotate often are kept, slow ones interpolated."""

    def dimension(rotations: float) -> float:
        turns = spec.original_max_len / (rotations * 2 * math.pi)
        return spec.dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    return ramp / (spec.factor * periods) + (1 - ramp) / periods
