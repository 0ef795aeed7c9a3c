"""What decoding and prefill are to reach on an H200 in bf16, at batch 1.

A number stands beside what was measured. One that is missed is no failure of the run: the page
tells how far away it is.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """The most that a time or ratio may be, and what would be better still, on an H200."""

    must: float
    stretch: float | None = None


TARGETS: dict[str, dict[str, Target]] = {
    "inference_1b2": {
        "decode_vanilla_ms": Target(0.80, 0.70),
        "decode_K2": Target(1.05, 1.02),
        "decode_K16": Target(1.10, 1.04),
        "decode_K64": Target(1.20, 1.10),
        "decode_K256": Target(1.6, 1.4),
        "decode_vanilla_over_transformers": Target(1 / 2.5),
    },
    "inference_550m": {
        "decode_vanilla_ms": Target(0.45, 0.38),
        "decode_vanilla_over_transformers": Target(1 / 2.5),
        "prefill_phd_K16": Target(1.03),
        "prefill_swa_K16": Target(1.3),
        "prefill_cswa_K16": Target(1.10, 1.085),
    },
}
"""By the part of `make gpu` and the name of its ratio. Windows are in hidden copies; contexts have
1024 tokens, and prompts 8192."""
