"""Central types: which modules an adapter changes, its identity and its weights. Works without torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""An adapter's public name: no comma (metric labels), no slash (paths)."""

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The projections of a GPT-2 block that an adapter may change."""


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base model that decide whether an adapter fits it."""

    n_layer: int
    n_embd: int
    n_inner: int

    def in_out(self, target: str) -> tuple[int, int]:
        """(in_features, out_features) of one of TARGETS."""
        d, inner = self.n_embd, self.n_inner
        return {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, inner),
            "mlp.c_proj": (inner, d),
        }[target]


@dataclass(frozen=True, order=True)
class ModuleKey:
    """One projection of one layer, e.g. layer 3, `mlp.c_fc`."""

    layer: int
    target: str

    def __str__(self) -> str:
        return f"h.{self.layer}.{self.target}"


@dataclass(frozen=True)
class LoraModule:
    """What an adapter does to one projection: y += (x A^T) B^T * scaling, A [rank, in], B [out, rank]."""

    key: ModuleKey
    rank: int
    scaling: float
    a_name: str  # tensor names in the safetensors file
    b_name: str


@dataclass(frozen=True)
class AdapterRef:
    """An adapter version as a request carries it: content digest, and where its bytes were seen."""

    digest: str  # sha256, hex
    name: str
    path: str


@dataclass(frozen=True)
class AdapterManifest:
    """What is known of an adapter without reading its weights into memory."""

    ref: AdapterRef
    modules: tuple[LoraModule, ...]  # sorted by key
    nbytes: int  # of the weights file
    base_model: str | None  # base_model_name_or_path, informative only
    created: float  # the weights file's mtime, seconds since the epoch

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections it changes in at least one layer, in TARGETS' order."""
        present = {module.key.target for module in self.modules}
        return tuple(target for target in TARGETS if target in present)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """What the store keeps in memory of a digest; ten thousand of them are a few megabytes."""

    digest: str
    rank: int  # the largest of any module
    targets: tuple[str, ...]
    nbytes: int  # of the weights file
    base_model: str | None
    created: float  # when it was published, seconds since the epoch
    shape: BaseShape  # of the base it was checked against

    @classmethod
    def of(cls, manifest: AdapterManifest, shape: BaseShape, created: float) -> AdapterVersion:
        """The version that a checked folder holds."""
        m = manifest
        return cls(m.ref.digest, m.rank, m.targets, m.nbytes, m.base_model, created, shape)

    def facts(self) -> dict[str, Any]:
        """Everything but the digest, as JSON takes it."""
        facts = asdict(self)
        del facts["digest"]
        return facts

    @classmethod
    def of_facts(cls, digest: str, facts: dict[str, Any]) -> AdapterVersion:
        """The version whose `facts` these are."""
        targets = tuple(target for target in TARGETS if target in facts["targets"])  # the same strings for all
        return cls(digest, **facts | {"targets": targets, "shape": BaseShape(**facts["shape"])})


@dataclass(frozen=True)
class LoraPair:
    """One module's weights, ready to compute with: y += (x @ a.T) @ b."""

    a: Tensor  # [rank, in]
    b: Tensor  # [rank, out], scaling folded in


@dataclass(frozen=True)
class Adapter:
    """Validated weights in memory."""

    digest: str
    pairs: dict[ModuleKey, LoraPair]

    @cached_property
    def targets(self) -> frozenset[str]:
        """The projections it changes in at least one layer."""
        return frozenset(key.target for key in self.pairs)

    @cached_property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max((pair.a.shape[0] for pair in self.pairs.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes its tensors take."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in (pair.a, pair.b))
