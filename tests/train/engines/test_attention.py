"""Which FlashAttention a run takes, what its attention is called, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from phd.attention.causal_kernels import (
    Platform,
    active_flash_attention,
    installed_flash_attentions,
)
from train.compose import load
from train.config import Config
from train.engines.attention import (
    attention_kernels,
    attention_platform,
    configure_attention,
    planned_attention,
)

CPU = torch.device("cpu")
HOPPER = Platform("cuda", (9, 0), cudnn=91900)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load([f"run.dir={tmp_path}", "model.head_dim=64"])


def with_flash_attention(config: Config, wanted: object) -> Config:
    return replace(config, engine=replace(config.engine, flash_attention=wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "installed", "version", "name"),
    [
        ("auto", {2}, 2, "cuDNN 9.19"),
        ("auto", {2, 3, 4}, 3, "cuDNN 9.19"),
        ("auto", {2, 4}, 4, "cuDNN 9.19"),
        (2, {2, 3}, 2, "FlashAttention-2"),
        (3, {2, 3}, 3, "FlashAttention-3"),
        (4, {2, 3, 4}, 4, "FlashAttention-4"),
    ],
)
def test_a_number_takes_that_flash_attention_and_auto_takes_cudnn_first(
    config: Config, wanted: object, installed: set[int], version: int, name: str
) -> None:
    config = with_flash_attention(config, wanted)
    platform = attention_platform(config, HOPPER, BF16, frozenset(installed))
    assert platform.flash_attention == version
    assert attention_kernels(config, platform, BF16).startswith(f"rule 1 by {name}, rules 2 and 3")
    isolating = replace(config, data=replace(config.data, documents="isolate"))
    told = attention_kernels(isolating, platform, BF16)
    assert told.startswith(f"rule 1 by FlashAttention-{version}, ")


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "why"),
    [
        (3, HOPPER, BF16, "engine.flash_attention=3: flash_attn_interface .* is not installed"),
        (4, HOPPER, BF16, "engine.flash_attention=4: flash_attn.cute .* is not installed"),
        (2, Platform("cpu"), BF16, "=2: there is no FlashAttention for the device cpu"),
        (2, HOPPER, FP32, "=2: FlashAttention computes in half precision alone"),
        (2, Platform("cuda", (7, 0)), BF16, "=2: it cannot do heads .* compute capability 7.0"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    config: Config, wanted: int, platform: Platform, dtype: torch.dtype, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        attention_platform(with_flash_attention(config, wanted), platform, dtype, frozenset({2}))


def test_no_kernel_for_a_run_is_an_error_of_its_settings(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision=.*no kernel .* in bfloat16"):
        attention_kernels(config, Platform("cuda", (7, 0)), BF16)


def test_a_run_on_the_cpu_tells_its_kernel_and_activates_nothing(config: Config) -> None:
    told = configure_attention(config, CPU)
    assert told.startswith("rule 1 by PyTorch's CPU flash kernel, rules 2 and 3 by ")
    assert told == planned_attention(config, Platform.of(CPU), FP32, is_here=True)
    assert active_flash_attention() == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model=vanilla"], "cuDNN 9.19"),
        (["model=naive_repeat"], "cuDNN 9.19"),
        (["model=phd"], "rule 1 by cuDNN 9.19, rule 2 by "),
        (["model=phd_cswa", "model.attention=flex"], "FlexAttention"),
        (["model.attention=reference"], "dense mask"),
    ],
)
def test_every_variant_and_backend_has_a_description(
    tmp_path: Path, settings: list[str], told: str
) -> None:
    config = load([f"run.dir={tmp_path}", "model.head_dim=64", *settings])
    found = planned_attention(config, HOPPER, BF16, is_here=False)
    assert found.startswith(told)
    assert "rule" in found or found == told


@pytest.mark.parametrize(
    ("package", "version"), [("flash_attn_interface.py", 3), ("flash_attn/cute/interface.py", 4)]
)
def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: int
) -> None:
    before = installed_flash_attentions()
    file = tmp_path / package
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("raise AssertionError('imported')")
    if version == 4:  # FlashAttention-2's package, which it shares
        (tmp_path / "flash_attn" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_flash_attentions() == before | {version}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
def test_a_run_on_cuda_sets_what_it_tells(config: Config) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        told = configure_attention(with_flash_attention(config, 2), device)
        assert told.startswith("rule 1 by FlashAttention-2, ")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        told = configure_attention(config, device)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        planned = planned_attention(config, Platform.of(device), BF16, is_here=True)
        assert told == planned
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
