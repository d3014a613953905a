"""What a quantized checkpoint looks like on disk: compressed-tensors' names, dtypes and `quantization_config`.

The config block is built from compressed-tensors' own classes, so a field it does not know cannot be written. KV-cache
scales are ours to write and to check: compressed-tensors 0.20 looks for an argument of `forward` that transformers has
renamed, and then drops the scales and the scheme without a word. A 4-bit KV cache has no place in this layout at all;
it lives in the sidecar.

Left out: asymmetric int4 (does not load back in transformers), activation order stored as g_idx (removed upstream).
"""

from __future__ import annotations

from typing import Any

import torch

from lcconvert.kernels.int4 import pack_int4
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import LinearFormat

FP8 = LinearFormat("fp8")


def quantization_config(
    form: LinearFormat,
    ignore: tuple[str, ...],
    *,
    wide: tuple[str, ...] = (),
    fp8: LinearFormat = FP8,
    fp8_kv: bool,
) -> dict[str, Any]:
    """The `quantization_config` block of config.json for every linear layer but `ignore` (names or `re:` patterns).

    Layers of `wide` are `fp8` whatever `form` is; their group comes first, as the first that matches is taken.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    def scheme(form: LinearFormat, targets: tuple[str, ...]) -> QuantizationScheme:
        if form.kind == "int4":
            weights = QuantizationArgs(
                num_bits=4, type="int", symmetric=True, strategy="group", group_size=form.group_size
            )
            return QuantizationScheme(targets=list(targets), weights=weights, format="pack-quantized")
        weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
        tokens = None
        if not form.exact_inputs:
            tokens = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
        return QuantizationScheme(
            targets=list(targets), weights=weights, input_activations=tokens, format="float-quantized"
        )

    schemes = [scheme(fp8, wide)] if wide else []
    schemes.append(scheme(form, ("Linear",)))
    kv_scheme = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="attn_head", dynamic=False)
    config = QuantizationConfig(
        config_groups={f"group_{number}": entry for number, entry in enumerate(schemes)},
        format=schemes[0].format if len(schemes) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=list(ignore),
        kv_cache_scheme=kv_scheme if fp8_kv else None,
    )
    block = config.model_dump(mode="json")
    return block | {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}


def int4_tensors(module: str, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes int8 [N, K] in -8..7 and scale [N, G] -> the three tensors of a `pack-quantized` linear layer."""
    return {
        f"{module}.weight_packed": pack_int4(codes),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def fp8_tensors(module: str, weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """weight float8_e4m3fn [N, K] and scale [N, 1] -> the two tensors of a `float-quantized` linear layer."""
    return {f"{module}.weight": weight, f"{module}.weight_scale": scale}


def kv_scale_tensors(layer: int, k_scale: torch.Tensor, v_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 [Hkv] each, stored value = value / scale, under the names vLLM reads. UserError for one not positive."""
    prefix = f"model.layers.{layer}.self_attn"
    tensors = {f"{prefix}.k_scale": k_scale, f"{prefix}.v_scale": v_scale}
    for name, scale in tensors.items():
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise UserError(
                f"{name} came out as {scale.tolist()}, expected positive numbers; the calibration text does not reach "
                "a head of this layer (all-zero weights?), so use --kv int4 or bf16, or repair the checkpoint"
            )
    return tensors
