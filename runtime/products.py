"""A layer's weights as the engine multiplies with them: neighbours merged into one product, expanded once a prefill.

Query, key and value projections read the same input, and so do gate and up: their rows are laid behind one another and
the modules keep views, so nothing is stored twice. Few rows (decode) multiply with the packed weight as it lies; many
rows (prefill) with an e4m3 or 16-bit copy that lives for one layer of one prefill.

The surprise: neighbours stored in different formats are joined as 16-bit copies, or in e4m3 when all of them can be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.kernels.fp8 import expand_e4m3, fp8_few_rows, fp8_matmul, fp8_product, quantize_fp8_rows
from lcconvert.kernels.int4 import SMALL_M, dequantize_int4, expand_int4_fp8, int4_matmul
from lcconvert.kernels.rms_norm import rms_norm, rms_norm_fp8
from lcconvert.kernels.silu_mul import silu_mul, silu_mul_fp8
from lcconvert.runtime.linear import Fp8Linear, Int4Linear
from lcconvert.runtime.model import Experts, Layer, RMSNorm
from lcconvert.runtime.timing import PartTimer, part

Gemm = Literal["16-bit", "fp8"]
Norm = tuple[torch.Tensor, float]  # the factor [H], eps
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # [M, K], or its e4m3 codes and float32 scales [M, 1]
MANY = SMALL_M + 1  # rows from which a product is worth expanding the weight


@dataclass(frozen=True)
class Product:
    """y = x @ W.T + b in `dtype`. `weight` is [N, K] in 16/32 bit or e4m3, or packed int4 [N, K/8]; these have `scale`.

    With `codes`, x comes as e4m3 codes and their scales; else in 16 or 32 bit. `exact`: the weight is e4m3 and x is not
    to be rounded.
    """

    dtype: torch.dtype
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    codes: bool = False
    exact: bool = False

    def __call__(self, x: Rows) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        if isinstance(x, tuple):
            assert self.scale is not None
            return fp8_product(*x, self.weight, self.scale, self.dtype, self.bias)
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        if self.weight.dtype == torch.int32:
            y = int4_matmul(x, self.weight, self.scale)
        elif self.exact:
            y = fp8_few_rows(x, self.weight, self.scale)
        else:
            y = fp8_matmul(x, self.weight, self.scale, x.dtype)
        return y if self.bias is None else y + self.bias

    def rows(self, begin: int, end: int) -> Product:
        """The product with outputs begin..end alone; no copy."""
        scale = None if self.scale is None else self.scale[begin:end]
        bias = None if self.bias is None else self.bias[begin:end]
        return replace(self, weight=self.weight[begin:end], scale=scale, bias=bias)

    def normed(self, x: torch.Tensor, norm: Norm | None, delta: torch.Tensor | None = None) -> Rows:
        """Norm of x [M, H], after x += delta in place, in the form this product takes; x itself without a norm."""
        if norm is not None and self.codes:
            return rms_norm_fp8(x, *norm, delta=delta)
        return self.taken(rows_normed(x, norm, delta))

    def gated(self, gate_up: torch.Tensor, activation: str = "silu") -> Rows:
        """silu(gate) * up of [M, 2I], or another activation's, in the form this product takes."""
        if activation == "silu":
            return (silu_mul_fp8 if self.codes else silu_mul)(gate_up)
        gate, up = gate_up.float().chunk(2, dim=1)
        return self.taken((F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype))

    def taken(self, x: torch.Tensor) -> Rows:
        """Plain rows in the form this product takes."""
        return quantize_fp8_rows(x) if self.codes else x


@dataclass(frozen=True)
class Products:
    """The products of a layer; those of the MLP are absent where experts take its place."""

    qkv: Product
    o: Product
    gate_up: Product | None = None
    down: Product | None = None


class LayerWeights:
    """One decoder layer, its neighbouring projections merged in place. A norm that its family lacks is None."""

    def __init__(self, layer: Layer):
        attn, mlp = layer.self_attn, layer.mlp
        self.window, self.whole_norm, self.head_dim = layer.window, attn.whole_norm, attn.head_dim
        self.sinks = None if attn.sinks is None else attn.sinks.detach().float()
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.attn_out_norm, self.mlp_out_norm = _norm(layer.post_self_attn_layernorm), _norm(layer.post_mlp_layernorm)
        self.q_norm, self.k_norm = _norm(attn.q_norm), _norm(attn.k_norm)
        groups = [[attn.q_proj, attn.k_proj, attn.v_proj], [attn.o_proj]]
        if isinstance(mlp, Experts):
            self.experts: Experts | None = mlp
        else:
            self.experts, self.activation = None, mlp.activation
            groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
        dtype = next(layer.parameters()).dtype
        self._groups = [_merged(modules, dtype) for modules in groups]

    @property
    def head_norms(self) -> tuple[Norm | None, Norm | None]:
        """The norms of q and k that are taken over each head."""
        return (None, None) if self.whole_norm else (self.q_norm, self.k_norm)

    def norm_whole(self, x: torch.Tensor, norm: Norm | None) -> None:
        """Norms rows x [M, heads * D] in place, where q and k are normed over all heads together."""
        if self.whole_norm and norm is not None:
            x.copy_(rms_norm(x, *norm))

    def mlp(
        self, products: Products, x: torch.Tensor, delta: torch.Tensor, timer: PartTimer | None = None
    ) -> torch.Tensor:
        """x += delta in place for rows [M, H], then what the MLP or the experts add to x. No row outlives the call."""
        if self.experts is not None:
            normed = rows_normed(x, self.mlp_norm, delta)
            with part(timer, "gemm"):
                return self.normed_out(self.experts(normed), self.mlp_out_norm)
        assert products.gate_up is not None
        assert products.down is not None
        taken = products.gate_up.normed(x, self.mlp_norm, delta)
        with part(timer, "gemm"):
            gate_up = products.gate_up(taken)
        gated = products.down.gated(gate_up, self.activation)
        del taken, gate_up
        with part(timer, "gemm"):
            out = products.down(gated)
        return self.normed_out(out, self.mlp_out_norm)

    @staticmethod
    def normed_out(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """The norm of an output [M, H] before it is added; x itself without one."""
        return x if norm is None else rms_norm(x, *norm)

    def few(self) -> Products:
        """For up to 16 rows. Neighbours that could not be merged get a joined copy: keep the result."""
        return Products(*(group[0] if len(group) == 1 else _joined(group, "16-bit") for group in self._groups))

    def many(self, gemm: Gemm) -> Products:
        """For a prefill: int4 weights expanded to e4m3 ("fp8") or to the activation dtype."""
        return Products(*(_joined(group, gemm) for group in self._groups))


def rows_normed(x: torch.Tensor, norm: Norm | None, delta: torch.Tensor | None = None) -> torch.Tensor:
    """Norm of x [M, H], after x += delta in place; x itself without a norm."""
    if norm is not None:
        return rms_norm(x, *norm, delta=delta)
    if delta is not None:
        x += delta
    return x


def _norm(module: nn.Module) -> Norm | None:
    return (module.factor, module.eps) if isinstance(module, RMSNorm) else None


def _merged(modules: list[nn.Module], dtype: torch.dtype) -> list[Product]:
    """One product over the rows of all modules, which become views of it; one each when their formats differ."""
    products = [_as_product(module, dtype) for module in modules]
    forms = {
        (p.weight.dtype, None if p.scale is None else (p.scale.dtype, p.scale.shape[1]), p.bias is None, p.exact)
        for p in products
    }
    if len(products) == 1 or len(forms) > 1:
        return products
    whole = _concatenated(products)
    begin = 0
    for module, product in zip(modules, products, strict=True):
        end = begin + len(product.weight)
        _rebind(module, whole.rows(begin, end))
        begin = end
    return [whole]


def _as_product(module: nn.Module, dtype: torch.dtype) -> Product:
    assert isinstance(module, (Int4Linear, Fp8Linear, nn.Linear))
    if isinstance(module, Int4Linear):
        return Product(dtype, module.weight_packed, module.weight_scale, module.bias)
    if isinstance(module, Fp8Linear):
        return Product(dtype, module.weight, module.weight_scale.float(), module.bias, exact=module.exact_inputs)
    return Product(dtype, module.weight, None, module.bias)


def _rebind(module: nn.Module, view: Product) -> None:
    if isinstance(module, Int4Linear):
        assert view.scale is not None
        module.weight_packed, module.weight_scale = view.weight, view.scale
    elif isinstance(module, Fp8Linear):
        assert view.scale is not None
        module.weight, module.weight_scale = view.weight, view.scale
    else:
        module.weight = nn.Parameter(view.weight, requires_grad=False)


def _joined(group: list[Product], gemm: Gemm) -> Product:
    pieces = [_expanded(product, gemm) for product in group]
    if len(pieces) > 1 and not all(piece.codes for piece in pieces):
        pieces = [_widened(piece) for piece in pieces]
    return pieces[0] if len(pieces) == 1 else _concatenated(pieces)


def _expanded(product: Product, gemm: Gemm) -> Product:
    if product.scale is None:
        return product
    if product.weight.dtype != torch.int32:
        return _widened(product) if product.exact else replace(product, codes=True)
    n, words = product.weight.shape
    if gemm == "fp8" and n % 16 == 0 and words % 2 == 0:
        codes, scale = expand_int4_fp8(product.weight, product.scale)
        return replace(product, weight=codes, scale=scale, codes=True)
    return replace(product, weight=dequantize_int4(product.weight, product.scale, product.dtype), scale=None)


def _widened(product: Product) -> Product:
    if product.scale is None:
        return product
    weight = expand_e4m3(product.weight).mul_(product.scale).to(product.dtype)
    return replace(product, weight=weight, scale=None, codes=False, exact=False)


def _concatenated(products: list[Product]) -> Product:
    scales = [p.scale for p in products if p.scale is not None]
    biases = [p.bias for p in products if p.bias is not None]
    assert len(biases) in (0, len(products)), "neighbouring projections: some with and some without a bias"
    return Product(
        products[0].dtype,
        torch.cat([p.weight for p in products]),
        torch.cat(scales) if scales else None,
        torch.cat(biases) if biases else None,
        products[0].codes,
        products[0].exact,
    )
