"""Compiles every Triton kernel for an H100 (sm_90) on a machine without one; prints a line for each. Run by a test.

The interpreter runs kernels as Python and forgives what the compiler does not: types, layouts, assembly.
"""

import triton.language as tl
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from lcconvert.kernels import (
    fp8,
    int4,
    kv_pages,
    paged_decode,
    rms_norm,
    rotary,
    select_blocks,
    select_pages,
    silu_mul,
    sparse_prefill,
    sparse_prefill_hopper,
)
from lcconvert.kernels.backend import LOG2E

TILE = "tensordesc<bf16[128,64]>"


def check(kernel, pointers, constants, source=ASTSource, **options):
    """`pointers` name the arguments that are not 32-bit integers; `constants` are the compile-time ones."""
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)
    assert compiled.metadata.shared <= 227 * 1024, "more shared memory than a processor has"


def check_decode(k_kind, v_kind, d=64):
    data = {"plain": "*bf16", "fp8": "*fp8e4nv", "int4": "*i16"}
    product = {"plain": tl.bfloat16, "fp8": tl.float16}
    pointers = {
        "q": "*bf16", "k_data": data[k_kind], "v_data": data[v_kind], "table": "*i32", "tokens": "*i32",
        "k_scale": "*fp32" if k_kind == "fp8" else "*fp16", "v_scale": "*fp32" if v_kind == "fp8" else "*fp16",
        "k_zero": "*fp16", "v_zero": "*fp16", "out": "*fp32", "lse": "*fp32", "owner": "*i32",
        "end_k": "*bf16", "end_v": "*bf16", "end_table": "*i32", "end_tokens": "*i32", "scale_log2": "fp32",
    }  # fmt: skip
    constants = {
        "K_INT4": k_kind == "int4", "K_FP8": k_kind == "fp8", "V_INT4": v_kind == "int4", "V_FP8": v_kind == "fp8",
        "RAGGED": k_kind == v_kind == "plain", "BY_HEAD": True, "SEQUENCES": 4,
        "KV_HEADS": 8, "GROUP": 4, "ROWS": 8, "D": d, "PAGE": 128,
        "K_DOT": product.get(k_kind, tl.float16), "V_DOT": product.get(v_kind, tl.bfloat16), "P_SHIFT": 0,
        "ASM": True, "K_TEXT": paged_decode._KEY_QUARTERS, "V_TEXT": paged_decode._VALUE_QUARTERS, "STAGES": 7,
        "END_WIDTH": 2, "END_DOT": tl.bfloat16, "PIECE": 64,
    }  # fmt: skip
    warps = d // 64 if v_kind == "int4" else 4
    check(paged_decode._decode_kernel, pointers, constants, num_warps=warps, num_stages=7)


def check_int4():
    pointers = {"x": "*bf16", "packed": "*u8", "scale": "*bf16", "out": "*bf16"}
    for one, columns, rows, groups, stages in ((True, 8, 16, 8, 3), (False, 16, 32, 4, 4)):
        check(
            int4._small_m_kernel,
            pointers,
            {"ROWS": rows, "GROUPS": groups, "BYTES": 64, "COLUMNS": columns, "ONE": one, "EVEN": one,
             "DOT": tl.bfloat16, "ASM": True, "PAIRS": int4._PAIRS_BF16}, num_warps=4, num_stages=stages,
        )  # fmt: skip
    check(
        int4._small_m_kernel,
        dict.fromkeys(("x", "scale", "out"), "*fp16") | {"packed": "*u8"},
        {"ROWS": 16, "GROUPS": 8, "BYTES": 16, "COLUMNS": 8, "ONE": True, "EVEN": False, "DOT": tl.float16,
         "ASM": True, "PAIRS": int4._PAIRS_FP16}, num_warps=4, num_stages=3,
    )  # fmt: skip
    check(int4._dequantize_kernel, pointers, {"ROWS": 2, "GROUPS": 32, "BYTES": 64})
    check(
        int4._expand_fp8_kernel,
        {"packed": "*u8", "scale": "*bf16", "codes_out": "*fp8e4nv", "row_scale": "*fp32"},
        {"GROUPS": 32, "BYTES": 64, "LARGEST": 448.0},
    )


def layout(rows, d):
    return gl.NVMMASharedLayout.get_default_for([rows, d], gl.bfloat16)


def main():
    check_decode("int4", "int4", 128)
    check_decode("fp8", "plain")
    check_decode("plain", "fp8")
    check_decode("plain", "plain")
    check(
        paged_decode._merge_kernel,
        {"outs": "*fp32", "lses": "*fp32", "owner": "*i32", "sinks": "*fp32", "out": "*bf16"},
        {"SLOTS": 64, "HEADS": 32, "GROUP": 4, "D": 64, "WIDE": 32, "SINKS": True, "LOG2E": LOG2E},
    )
    check(
        select_pages._bound_kernel,
        {"q": "*bf16", "scale": "*fp16", "zero": "*fp16", "table": "*i32", "pages": "*i32", "keys": "*i32"},
        {"KV_HEADS": 8, "GROUP": 4, "D": 64, "PAGES": 64, "FORCED": 2**31 - 1},
    )
    check(
        select_pages._list_pages_kernel,
        {"keys": "*i32", "table": "*i32", "pages": "*i32", "out": "*i32", "tokens": "*i32"},
        {"PAGE": 128, "ONE": 2**30, "FORCED": 2**31 - 1, "WIDTH": 256},
    )
    check(
        sparse_prefill._prefill_kernel,
        {"q_desc": TILE, "k_desc": TILE, "v_desc": TILE, "o_desc": TILE, "index": "*i32", "count": "*i32",
         "scale_log2": "fp32"},
        {"GROUP": 4, "D": 64, "BLOCK": 128, "DOT": tl.bfloat16}, num_warps=8, num_stages=2,
    )  # fmt: skip
    for d in (32, 64, 128):
        half, whole = (f"tensordesc<bf16[{rows},{d}],{layout(rows, d)!r}>" for rows in (64, 128))
        check(
            sparse_prefill_hopper._hopper_prefill_kernel,
            {"q_desc": half, "k_desc": whole, "v_desc": whole, "o_desc": half, "index": "*i32", "count": "*i32",
             "scale_log2": "fp32"},
            {"GROUP": 4, "D": d, "BLOCK": 128, "STAGES": 2}, source=GluonASTSource, num_warps=4, maxnreg=168,
        )  # fmt: skip
    rounding = {"D": 64, "BLOCK": 128, "LARGEST": 16.0, "TINY": 1e-30}
    codes = "tensordesc<fp8e4nv[128,64]>"
    check(select_blocks._round_e4m3_kernel, {"x_desc": TILE, "codes_desc": codes, "units": "*fp32"}, rounding)
    for eight in (True, False):
        check(
            select_blocks._score_kernel,
            {"q": "*bf16", "q_desc": TILE, "pooled_desc": codes if eight else TILE, "units": "*fp32",
             "scores": "*fp32", "scale": "fp32"},
            {"HEADS": 32, "GROUP": 4, "PER": 4, "KEYS": 128, "DOT": tl.bfloat16, "EIGHT": eight, **rounding},
            num_warps=8, num_stages=3,
        )  # fmt: skip
    check(
        select_blocks._list_kernel,
        {"scores": "*fp32", "log_alpha": "*fp32", "index": "*i32", "count": "*i32"},
        {"WIDTH": 256},
    )
    check_int4()
    check(
        fp8._quantize_rows_kernel,
        {"x": "*bf16", "codes": "*fp8e4nv", "scale": "*fp32"},
        {"BLOCK": 512, "LARGEST": 448.0, "SMALLEST": 2.0**-100},
    )
    check(
        fp8._few_rows_kernel,
        {"x": "*bf16", "weight": "*fp8e4nv", "weight_scale": "*fp32", "bias": "*bf16", "out": "*bf16"},
        {"ROWS": 16, "PIECES": 4, "WIDTH": 128, "COLUMNS": 8, "ONE": False, "EVEN": True, "DOT": tl.bfloat16,
         "BIAS": True}, num_warps=4, num_stages=4,
    )  # fmt: skip
    row = {"x": "*bf16", "delta": "*bf16", "weight": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", "eps": "fp32"}
    check(
        rms_norm._rms_norm_kernel,
        row,
        {"ADD": True, "FP8": True, "BLOCK": 512, "LARGEST": 448.0, "SMALLEST": 2.0**-100},
    )
    check(silu_mul._silu_mul_kernel, {"gate_up": "*bf16", "out": "*bf16"}, {"BLOCK": 512})
    check(
        silu_mul._silu_mul_fp8_kernel,
        {"gate_up": "*bf16", "codes": "*fp8e4nv", "scale": "*fp32"},
        {"BLOCK": 512, "LARGEST": 448.0, "SMALLEST": 2.0**-100},
    )
    tables = {"cos": "*fp32", "sin": "*fp32"}
    check(
        rotary._rotary_kernel,
        {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", **tables},
        {"NORM": True, "HALF": 64, "HEADS": 16},
    )
    check(
        rotary._rotate_append_kernel,
        {"qkv": "*bf16", "q_weight": "*bf16", "k_weight": "*bf16", "q": "*bf16", "k_pages": "*bf16",
         "v_pages": "*bf16", "page": "*i32", "page_row": "*i32", "q_eps": "fp32", "k_eps": "fp32", **tables},
        {"NORM": True, "HALF": 64, "PAGE": 128}, num_warps=1,
    )  # fmt: skip
    for by_channel in (True, False):
        check(
            kv_pages._quantize_kernel,
            {"x": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*fp16"},
            {"D": 16, "PAGE": 128, "BY_CHANNEL": by_channel},
        )


if __name__ == "__main__":
    main()
