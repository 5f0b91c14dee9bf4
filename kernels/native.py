"""The C++ kernels behind torch tensors: packed small-batch GEMM, attention over ragged rows, norm, gelu,
LoRA per row, sampling.

Each states its operation in kernels/reference.py. Tensors are contiguous in their last dimension, on the CPU, fp32 or
bf16; nothing is checked here beyond what a caller in this project can get wrong.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from kernels.build import library

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_RANK = 512
"""The largest rank that `lora` takes; MAX_RANK of the sources."""


class NativeUnavailable(RuntimeError):
    """The library isn't built, can't be loaded, or doesn't know the instruction set asked for."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the kernels' order: panels of columns."""

    data: torch.Tensor  # [panels * K * panel]
    bias: torch.Tensor | None  # [N] fp32
    k: int
    n: int

    @cached_property
    def addresses(self) -> tuple[int, int | None]:
        """Of data and bias."""
        return self.data.data_ptr(), None if self.bias is None else self.bias.data_ptr()


@dataclass(frozen=True)
class Edits:
    """What is added to some tokens' scores before the repetition penalty, and taken from them after it; E in all."""

    ids: torch.Tensor  # [E] int64, each once in a row
    ids_from: torch.Tensor  # [S + 1] int64: row r has ids[ids_from[r]:ids_from[r + 1]]
    added: torch.Tensor  # [E] fp32
    taken: torch.Tensor  # [E] fp32; inf bans the token


class Native:
    """The kernels of one instruction set."""

    def __init__(self, isa: str | None = None) -> None:
        """`isa`: avx512_bf16, avx512, avx2 or plain; if None the best there is. Raises NativeUnavailable."""
        path = library()
        if not path.is_file():
            raise NativeUnavailable(
                "the CPU kernels aren't built; `make install` builds them where there is a C++ compiler"
            )
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"{path.name} can't be loaded: {error}") from error
        self._lib.chorus_kernels.restype = c_void_p
        kernels = self._lib.chorus_kernels(None if isa is None else isa.encode())
        if kernels is None:
            raise NativeUnavailable(f"this processor has no {isa}")
        self._kernels = c_void_p(kernels)
        self._lib.chorus_isa.restype, self._lib.chorus_panel.restype = c_char_p, c_int64
        self.isa: str = self._lib.chorus_isa(self._kernels).decode()
        self._panel = int(self._lib.chorus_panel(self._kernels))
        f = self._function
        pack, linear = (
            [c_void_p, *[c_int64] * 4, c_void_p],
            [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, *[c_int64] * 4],
        )
        attend = [c_void_p] * 6 + [c_int64] * 4 + [c_float]
        lora = [c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 5, *[c_int64] * 3]
        self._pack = {dtype: f(f"pack_{s}", pack) for dtype, s in _SUFFIX.items()}
        self._linear = {(dtype, dtype): f(f"linear_{s}", linear) for dtype, s in _SUFFIX.items()}
        self._linear[torch.bfloat16, torch.float32] = f("linear_bf16_f32", linear)
        self._attend = {dtype: f(f"attend_{s}", attend) for dtype, s in _SUFFIX.items()}
        self._choose = f("choose", [c_void_p, c_int64, c_int64, *[c_void_p] * 15])
        self._logprobs = f("logprobs", [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, *[c_void_p] * 3])
        norm = [*[c_void_p] * 4, c_float, c_void_p, c_int64, c_int64]
        self._norm = {dtype: f(f"norm_{s}", norm) for dtype, s in _SUFFIX.items()}
        self._gelu = {dtype: f(f"gelu_{s}", [c_void_p, c_int64]) for dtype, s in _SUFFIX.items()}
        self._lora = {dtype: f(f"lora_{s}", lora) for dtype, s in _SUFFIX.items()}

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels of this type."""
        return dtype in _SUFFIX

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """Pack `weight` [K, N] (any strides; K even), which may be freed afterwards."""
        k, n = weight.shape
        if k % 2:
            raise ValueError(f"a weight of {k} input features can't be packed, only an even number: use --kernels off")
        data = torch.empty(-(-n // self._panel) * self._panel * k, dtype=weight.dtype)
        self._pack[weight.dtype](weight.data_ptr(), *weight.stride(), k, n, data.data_ptr())
        return PackedLinear(data, None if bias is None else bias.float(), k, n)

    def rows_of(self, w: PackedLinear, columns: torch.Tensor) -> torch.Tensor:
        """The weight's columns [n] as they were before packing: [n, K]. Of an embedding W^T, its rows."""
        panel, at = columns // self._panel, columns % self._panel
        data = w.data
        if data.dtype == torch.bfloat16:  # pairs along k
            return data.view(-1, w.k // 2, self._panel, 2)[panel, :, at].flatten(1)
        return data.view(-1, w.k, self._panel)[panel, :, at]

    def linear(self, x: torch.Tensor, w: PackedLinear, out: torch.Tensor) -> torch.Tensor:
        """out [M, N] = x [M, K] W + b; out is of x's type, or fp32."""
        self._linear[x.dtype, out.dtype](
            x.data_ptr(), x.stride(0), *w.addresses, out.data_ptr(), out.stride(0), x.shape[0], w.k, w.n
        )
        return out

    def attend(
        self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor,
        scale: float, out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """out [D, H Dh]: qkv [D, 3 H Dh]; keys, values [rows, H, max_len, Dh] contiguous; rows, positions [D] int64."""
        _, heads, max_len, head_dim = keys.shape
        self._attend[qkv.dtype](
            qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(), positions.data_ptr(), out.data_ptr(),
            qkv.shape[0], heads, head_dim, max_len, scale,
        )  # fmt: skip
        return out

    def norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """x [N, d] += delta in place, if given; out [N, d] = layer norm of x. weight, bias [d] fp32; all contiguous."""
        self._norm[x.dtype](
            x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps,
            out.data_ptr(), *x.shape,
        )  # fmt: skip
        return out

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU with the tanh approximation, in place; x contiguous."""
        self._gelu[x.dtype](x.data_ptr(), x.numel())
        return x

    def lora(self, x: torch.Tensor, y: torch.Tensor, lines: int, count: int) -> None:
        """y[n] += w (x[n] A^T) B for each of `count` lines, in order; x [M, K], y [M, N].

        lines: address of int64 [5, count]: row n, addresses of A [r, K] and B [r, N], rank r, the bits of weight w in
        fp64. Lines of one adapter should stand together.
        """
        step = 8 * count
        self._lora[x.dtype](
            x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), lines, lines + step, lines + 2 * step,
            lines + 3 * step, lines + 4 * step, count, x.shape[1], y.shape[1],
        )  # fmt: skip

    def choose(
        self, raw: torch.Tensor, penalty: torch.Tensor, seen: torch.Tensor, seen_from: torch.Tensor,
        temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor,
        wanted: torch.Tensor, typical_p: torch.Tensor | None = None, edits: Edits | None = None,
    ) -> tuple[list[int], list[float]]:  # fmt: skip
        """The next token of each row and its log-softmax where wanted, elsewhere 0.

        The token is -1 where the row holds NaN or its largest is infinite, -2 where it does so after its edits.

        raw [S, V] fp32 contiguous; penalty [S] fp32, of row r's tokens seen[seen_from[r]:seen_from[r + 1]] (int64, in a
        row with edits each once); temperature [S] fp32, 0 is greedy; top_k [S] int64, V or more is off; top_p and
        typical_p [S] fp32, 1 or more is off; uniform [S] fp64 in [0, 1); wanted [S] int64, 0 or 1.
        """
        tokens = torch.empty(len(raw), dtype=torch.int64)
        logprobs = torch.empty(len(raw), dtype=torch.float64)
        changed = (None,) * 4 if edits is None else (edits.ids, edits.ids_from, edits.added, edits.taken)
        parts = (
            penalty, seen, seen_from, temperature, top_k, top_p, typical_p, *changed, uniform, wanted, tokens, logprobs
        )  # fmt: skip
        self._choose(raw.data_ptr(), *raw.shape, *(None if part is None else part.data_ptr() for part in parts))
        return [int(t) for t in tokens.numpy()], [float(p) for p in logprobs.numpy()]

    def logprobs(
        self, raw: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-softmax of each row at its token [S], and its counts[r] best tokens with theirs [S, max(counts)] twice.

        Best first, equals by id. NaN, and no best ones, where the row holds NaN or its largest is infinite.
        raw [S, V] fp32 contiguous; tokens, counts [S] int64, counts 0..V. Results are int64 and fp64.
        """
        most = max((int(count) for count in counts.numpy()), default=0)
        at = torch.empty(len(raw), dtype=torch.float64)
        ids = torch.empty(len(raw), most, dtype=torch.int64)
        best = torch.empty(len(raw), most, dtype=torch.float64)
        self._logprobs(
            raw.data_ptr(), *raw.shape, tokens.data_ptr(), counts.data_ptr(), most, at.data_ptr(), ids.data_ptr(),
            best.data_ptr(),
        )  # fmt: skip
        return at, ids, best

    def _function(self, name: str, arguments: Sequence[type]) -> Callable[..., None]:
        function = getattr(self._lib, f"chorus_{name}")
        function.argtypes, function.restype = [c_void_p, *arguments], None
        return partial(function, self._kernels)
