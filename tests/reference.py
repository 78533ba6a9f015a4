"""A slow, readable reference of the method: plain Python loops over tokens, channels and rows, in float64.

Nothing here shares code with the package. It follows the definitions of the README one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SQRT_2_PI = math.sqrt(2 * math.pi)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def selection(name: str, z: float) -> float:
    """ρ(z)."""
    if name == "silu":
        return sigmoid(z)
    if name == "quick_gelu":
        return sigmoid(1.702 * z)
    if name == "gelu":
        return normal_cdf(z)
    if name == "gelu_tanh":
        # ½(1 + tanh v) in the form that does not cancel for very negative v.
        return sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    if name == "relu":
        return float(z > 0)
    assert name == "relu_squared"
    return max(z, 0.0)


def selection_derivative(name: str, z: float) -> float:
    """ρ'(z)."""
    if name == "silu":
        return sigmoid(z) * (1 - sigmoid(z))
    if name == "quick_gelu":
        return 1.702 * sigmoid(1.702 * z) * (1 - sigmoid(1.702 * z))
    if name == "gelu":
        return math.exp(-z * z / 2) / SQRT_2_PI
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        return 2 * sigmoid(2 * inner) * sigmoid(-2 * inner) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    if name == "relu":
        return 0.0
    assert name == "relu_squared"
    return float(z > 0)


def output(name: str, z: float) -> float:
    """φ(z)."""
    return z * selection(name, z)


def output_derivative(name: str, z: float) -> float:
    """φ'(z)."""
    return selection(name, z) + z * selection_derivative(name, z)


def homogeneity(name: str, z: float) -> float:
    """E(z), 1 where φ is silent."""
    if name == "gelu" and z < -20:
        # Φ is on its way to underflow; Φ(z) = pdf(z)/|z|·(1 − 1/z² + 3/z⁴ − …) has nine digits here.
        return 1 - z * z / (1 - z**-2 + 3 * z**-4 - 15 * z**-6 + 105 * z**-8)
    rho = selection(name, z)
    return 1.0 if rho == 0 else 1 + z * selection_derivative(name, z) / rho


def criterion_value(criterion: str, name: str, z: float, signed: bool) -> float:
    value = {
        "selection_derivative": selection_derivative,
        "output_derivative": output_derivative,
        "output_derivative_change": output_derivative,
        "homogeneity_gap": lambda n, x: homogeneity(n, x) - 1,
    }[criterion](name, z)
    return value if signed else abs(value)


def responsiveness(criterion: str, name: str, tokens: Sequence[Sequence[float]], signed: bool = False) -> list[float]:
    """r_i: mean over real tokens; ``tokens`` is a list of per-token channel lists."""
    channels = len(tokens[0])
    return [
        sum(criterion_value(criterion, name, token[i], signed) for token in tokens) / len(tokens)
        for i in range(channels)
    ]


def corrected_average(history: Sequence[float], beta: float) -> float:
    """Bias-corrected exponential moving average of ``history``."""
    average = 0.0
    for value in history:
        average = beta * average + (1 - beta) * value
    return average / (1 - beta ** len(history))


def top_k(scores: Sequence[float], keep_fraction: float) -> list[float]:
    """1 for the nearest whole number to k·d of channels with the largest scores."""
    count = max(1, math.floor(keep_fraction * len(scores) + 0.5))
    kept = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [1.0 if i in kept else 0.0 for i in range(len(scores))]


def regime(name: str, z: float, tau: float) -> int:
    """0 suppressed, 1 transitional, 2 homogeneous."""
    e = homogeneity(name, z)
    if e < 0:
        return 0
    return 2 if abs(e - 1) <= tau else 1


def regime_shares(name: str, values: Sequence[float], tau: float) -> tuple[list[float], list[float]]:
    """p_R and p_R·mean|E−1| over ``values``, each weighted by |φ|."""
    mass, gap_mass = [0.0] * 3, [0.0] * 3
    for z in values:
        weight = abs(output(name, z))
        mass[regime(name, z, tau)] += weight
        gap_mass[regime(name, z, tau)] += weight * abs(homogeneity(name, z) - 1)
    total = sum(mass)
    return [m / total for m in mass], [g / total for g in gap_mass]


def step_scale(shares: Sequence[float], gap_shares: Sequence[float], eta_min: float) -> float:
    """η = Σ_R p_R·c_R."""
    scale = 0.0
    for p, q in zip(shares, gap_shares, strict=True):
        if p > 0:
            scale += p * min(1.0, max(eta_min, 1 / (1 + q / p)))
    return scale


def is_meaningful(shares: Sequence[float]) -> bool:
    return sum(p >= 0.05 for p in shares) >= 2


def update_rows(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], weights: Sequence[float]
) -> list[list[float]]:
    """B_before + w·(B_after − B_before), row by row."""
    return [
        [b + w * (a - b) for b, a in zip(row_before, row_after, strict=True)]
        for row_before, row_after, w in zip(before, after, weights, strict=True)
    ]
