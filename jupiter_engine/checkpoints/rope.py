"""RoPE as config.json describes it: read from every form in use, written in the form that all readers share.

transformers 5 writes one block `rope_parameters`; older folders hold
`rope_theta` and `rope_scaling`, which is also all that mlx-lm and llama.cpp
read. A folder may carry both, and then they must say the same.
"""

from __future__ import annotations

import math
from typing import Any

Scaling = dict[str, float | str]

KINDS = ("default", "linear", "llama3", "yarn")
"""The kinds that both twins compute exactly as transformers does."""

_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def number(scaling: Scaling, key: str) -> float:
    return float(scaling[key])


def read(values: dict[str, Any]) -> tuple[float, Scaling | None]:
    """Theta and scaling (None: plain RoPE) of a config.json.

    Raises ValueError where the file contradicts itself or asks for what the
    twins do not compute, KeyError for a missing factor.
    """
    new, old = dict(values.get("rope_parameters") or {}), dict(values.get("rope_scaling") or {})
    thetas = {float(one) for one in (new.get("rope_theta"), old.pop("rope_theta", None), values.get("rope_theta"))
              if one is not None}  # fmt: skip
    if len(thetas) > 1:
        raise ValueError(f"two values of rope_theta stand in it: {', '.join(f'{one:g}' for one in sorted(thetas))}")
    new.pop("rope_theta", None)
    theta = thetas.pop() if thetas else 10000.0
    if not theta > 1.0:
        raise ValueError(f"rope_theta is {theta:g}, it must be larger than 1")
    partial = {float(one) for block in (values, new, old) if (one := block.get("partial_rotary_factor")) is not None}
    if partial - {1.0}:
        raise ValueError(f"partial_rotary_factor is {min(partial):g}; only whole heads are rotated here")
    # An empty block says nothing; `{"rope_type": "default"}` says that there is no scaling.
    said = [_scaling(block) for block in (new, old) if block]
    if len(said) == 2 and said[0] != said[1]:
        raise ValueError("rope_parameters and rope_scaling describe different RoPE scalings")
    return theta, said[0] if said else None


def _scaling(block: dict[str, Any]) -> Scaling | None:
    kinds = {str(block[key]) for key in ("rope_type", "type") if block.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(f"rope_type and type name different scalings: {', '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        return None
    if kind == "dynamic":
        raise ValueError(
            "RoPE scaling 'dynamic' is not supported; up to the model's context length it changes nothing, so "
            "removing it from config.json gives the same model there"
        )
    if kind not in _KEYS:
        raise ValueError(f"RoPE scaling {kind!r} is not supported ({', '.join(KINDS)} are)")
    found: Scaling = {"rope_type": kind}
    for key in _KEYS[kind]:
        value = block.get(key)
        if value is None and kind == "yarn":
            value = _YARN_DEFAULTS.get(key)
        if value is None:
            raise KeyError(key)
        if not (math.isfinite(float(value)) and float(value) > 0.0):
            raise ValueError(f"{key} of the RoPE scaling is {value}, it must be a positive number")
        found[key] = float(value)
    if kind == "llama3" and number(found, "high_freq_factor") <= number(found, "low_freq_factor"):
        raise ValueError("high_freq_factor of the RoPE scaling must be larger than low_freq_factor")
    if kind == "yarn":
        _check_yarn(block, found)
    return found


def _check_yarn(block: dict[str, Any], found: Scaling) -> None:
    """Refuse the parts of YaRN that readers of model folders disagree on (mlx-lm ignores or reads them otherwise)."""
    wanted = attention_factor(found)
    stated = block.get("attention_factor")
    if stated is not None and not math.isclose(float(stated), wanted, rel_tol=1e-6):
        raise ValueError(
            f"attention_factor of the YaRN scaling is {stated}, only the paper's {wanted:.6g} is supported"
        )
    for key, usual in (("mscale", 1.0), ("mscale_all_dim", 0.0), ("truncate", True)):
        if block.get(key) is not None and float(block[key]) != float(usual):
            raise ValueError(f"{key} of the YaRN scaling is {block[key]}, only {usual} is supported")


def attention_factor(scaling: Scaling | None) -> float:
    """What cos and sin are multiplied with: 1, for YaRN 0.1 ln(factor) + 1."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    factor = number(scaling, "factor")
    return 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0


def yarn_range(scaling: Scaling, head_dim: int, theta: float) -> tuple[float, float]:
    """First and last pair (as numbers on the line of pairs) between which YaRN goes from kept to stretched."""
    original = number(scaling, "original_max_position_embeddings")

    def pair(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(number(scaling, "beta_fast"))), 0)
    last = min(math.ceil(pair(number(scaling, "beta_slow"))), head_dim - 1)
    return (first, last) if first != last else (first, last + 0.001)


def write(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The keys of config.json: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for the rest.

    With another theta than 10000 and only the new key, mlx-lm would compute
    wrong logits without a word.
    """
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}
    return {
        "rope_parameters": {**scaling, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": dict(scaling),
    }
