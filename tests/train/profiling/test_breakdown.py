"""Every kernel counts for its group, once, and what is left is idle."""

import re

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from train.profiling.breakdown import Breakdown, Group, breakdown, group_of, table

KERNELS = {
    "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": Group.PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": Group.PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": Group.PRODUCTS,
    "triton_tem_fused_addmm_3": Group.PRODUCTS,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3": Group.RULE_1,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": Group.RULE_1,
    "fmha_cutlassF_f32_aligned_64x64_rf_sm80": Group.RULE_1,
    "triton_tem_fused_flex_attention_0": Group.HIDDEN,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": (
        Group.ELEMENTWISE
    ),
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2": Group.ELEMENTWISE,
    "triton_poi_fused__to_copy_0": Group.COPIES,
    "triton_red_fused__log_softmax_nll_loss_forward_5": Group.LOSS,
    "void (anonymous namespace)::cunn_SoftMaxForward<4, float, float>": Group.LOSS,
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": Group.OPTIMIZER,
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": Group.COMMUNICATION,
    "Memcpy HtoD (Pinned -> Device)": Group.COPIES,
    "Memset (Device)": Group.COPIES,
    "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>": Group.COPIES,
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_known_by_its_name(name: str) -> None:
    assert group_of(name) == KERNELS[name]


@pytest.mark.parametrize(
    ("name", "callers", "group"),
    [
        ("aten::mm", ["aten::linear"], Group.PRODUCTS),
        ("aten::bmm", ["aten::matmul", "_Packed"], Group.HIDDEN),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ["_Packed"], Group.RULE_1),
        ("aten::_fused_adamw_", ["Optimizer.step#AdamW.step"], Group.OPTIMIZER),
        ("aten::mul_", ["Optimizer.step#AdamW.step"], Group.OPTIMIZER),
        ("aten::mm", ["aten::linear_cross_entropy"], Group.PRODUCTS),
        ("aten::exp_", ["_Chunked"], Group.LOSS),
        ("aten::copy_", ["aten::_to_copy", "aten::to"], Group.COPIES),
        ("aten::rms_norm", [], Group.ELEMENTWISE),
    ],
)
def test_an_operator_is_known_by_its_callers_too(
    name: str, callers: list[str], group: Group
) -> None:
    assert group_of(name, callers) == group


def test_the_losss_own_kernel_is_known() -> None:
    pytest.importorskip("triton")
    from phd import cross_entropy

    assert group_of(cross_entropy._kernel.__name__) == Group.LOSS


def kernel(name: str, start: float, end: float, *, annotation: bool = False) -> FunctionEvent:
    return FunctionEvent(
        1, name, 0, start, end, device_type=DeviceType.CUDA, is_user_annotation=annotation
    )


def test_kernels_of_two_streams_at_the_same_time_are_told() -> None:
    events = [
        kernel("nvjet", 0, 6000),
        kernel("ncclDevKernel_AllGather", 4000, 8000),
        kernel("Optimizer.step#AdamW.step", 0, 9000, annotation=True),
        kernel("nvjet", 9000, 10_000),
        FunctionEvent(2, "aten::mm", 0, 0, 9000),  # the launch, on the CPU
    ]
    found = breakdown(events, 2, 0.012)
    spent = {group: ms for group, ms in found.groups.items() if ms}
    assert spent == pytest.approx({Group.PRODUCTS: 3.5, Group.COMMUNICATION: 2.0})
    assert (found.twice, found.idle, found.step) == pytest.approx((1.0, 1.5, 6.0))


def test_the_operators_of_a_cpu_are_counted_once_each() -> None:
    """Groups and idle add up to the step: no operator is left out, and none counts twice."""
    a = torch.randn(64, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("annotated"):
            loss = torch.nn.functional.silu(a @ a).sum()
        loss.backward()
    events = profiler.events()
    assert events is not None
    first, last = (f(x) for f, x in ((min, starts(events)), (max, ends(events))))
    found = breakdown(events, 1, (last - first) / 1e6)
    assert found.groups[Group.PRODUCTS] > 0
    assert found.groups[Group.ELEMENTWISE] > 0
    total = sum(found.groups.values()) - found.twice + found.idle
    assert total == pytest.approx(found.step, rel=0.02)


def starts(events: list[FunctionEvent]) -> list[float]:
    return [event.time_range.start for event in events]


def ends(events: list[FunctionEvent]) -> list[float]:
    return [event.time_range.end for event in events]


def test_the_table_has_the_most_first_and_adds_up() -> None:
    groups = dict.fromkeys(Group, 0.0) | {Group.LOSS: 2.0, Group.PRODUCTS: 7.0}
    lines = table(Breakdown(groups, 1.0, 2.0, 10.0)).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [
        *("matrix products", "loss without its products"),
        *("less what ran at the same time", "idle", "step"),
    ]
    *parts, step = (float(re.findall(r"-?\d+\.\d\d", line)[0]) for line in lines[2:])
    assert sum(parts) == step == 10
    assert lines[2].endswith("| 70.0 % |")
