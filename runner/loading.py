"""A model's files, opened, and how its skeleton is given to llama.cpp: settled before any memory is planned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_edge.models.errors import CannotRun, UnknownArchitecture, UnknownName, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.store import ExpertModel, open_model
from moe_edge.runner import dense_repack, signals
from moe_edge.runner.capi import trim_memory
from moe_edge.runner.engine_options import CACHE_TYPES, EngineOptions, attention_defaults, buffer_bytes
from moe_edge.runner.llama import LOAD_LOCK, Placement, captured_log, explained, load_llama
from moe_edge.runner.native import NativeModel
from moe_edge.runner.paths import AnyPath
from moe_edge.runner.prove import prove_once
from moe_edge.runner.reason import reason, refusal


class Loading:
    """model: its skeleton and where its experts are. name: what messages call it. n_ctx, n_ubatch: in tokens.

    named: what messages call the model, when `path` only stands for it. verify: compare all checksums first.
    Raises whatever opening the files raises, and UnknownName for an architecture that is not known.
    """

    def __init__(
        self, path: str | Path, options: EngineOptions, *, verify: bool = False, named: str | Path | None = None
    ) -> None:
        self.options = options
        try:
            self.model: ExpertModel = open_model(Path(path), verify=verify)
        except UnknownArchitecture as e:
            raise explained(e) from e
        self.skeleton = read_gguf(self.model.skeleton)
        self.n_ctx = options.n_ctx or min(4096, self.trained_context())
        self.flash_attn, self.n_ubatch = self._attention()
        self.name = str(named or (self.model.files[0] if self.model.in_place else self.model.skeleton))
        self._remember = named is None
        self.repack = dense_repack.repacks(options.repack)
        self.repacked = dense_repack.repacked(self.skeleton) if self.repack else dense_repack.NONE
        self.window = 0  # of sliding attention, in tokens; known after a dry load

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The skeleton's key-values, every byte of them."""
        return self.skeleton.kv

    def trained_context(self) -> int:
        """The context length the skeleton names; 4096 when it names none."""
        value = self._of_architecture("context_length")
        return int(value) if isinstance(value, int) and value > 0 else 4096

    @property
    def n_head(self) -> int:
        """Attention heads, the most of any layer."""
        heads = self._of_architecture("attention.head_count") or 1
        return max(heads) if isinstance(heads, list) else int(heads)

    def prove(self) -> None:
        """Have a child process show what options.proof asks for, unless it was shown before. Raises CannotRun."""
        prove_once(
            self.model, self.skeleton, self.name, self.options.proof, flash_attn=self.flash_attn,
            repack=self.repack, remember=self._remember,
        )  # fmt: skip

    def llama(
        self, native: NativeModel | None, *, no_alloc: bool, placement: Placement | None = None
    ) -> tuple[Any, str]:
        """A Llama on the skeleton, with the log of its loading. Its expert products are those of `native`, or, where
        that is None, all on the devices of `placement`.

        no_alloc: nothing is allocated nor read; the log says what would be. Raises CannotRun with llama.cpp's words.
        """
        outputs = 0 if self.options.logits_all else 1
        direct = no_alloc or not self._mapped  # llama.cpp aborts on a mapped load that allocates nothing
        repacking = dense_repack.only_repack() if self.repack else contextlib.nullcontext()
        with LOAD_LOCK, captured_log() as log, signals.deferred() as pressed, repacking:
            if native is not None:
                native.arm()
            try:
                llama = load_llama(
                    self._arguments(placement), direct=direct, no_alloc=no_alloc, repack=self.repack,
                    n_outputs_max=outputs, metadata=self.metadata, go_on=lambda: not pressed, placement=placement,
                )  # fmt: skip
            except (ValueError, RuntimeError) as e:
                why = (reason(log) or str(e)).replace(str(self.model.skeleton), self.name)
                raise CannotRun(refusal(self.name, why)) from e
            finally:
                if native is not None:
                    native.disarm()
            if self.repacked.nbytes and not no_alloc:
                trim_memory()  # of the copies that the matrices were read into
            return llama, "".join(log)

    @property
    def _mapped(self) -> bool:
        """Whether the skeleton is mapped. With repacked weights it is not: what was repacked would be there twice."""
        return self.options.map_dense and not self.repack

    def _of_architecture(self, key: str) -> Any:
        return self.skeleton.kv.get(f"{self.model.architecture}.{key}")

    def _attention(self) -> tuple[bool, int]:
        """(flash_attn, n_ubatch) as asked for, or the defaults for this model."""
        token_bytes = buffer_bytes(self.model.layers[0].n_embd, self.model.n_expert_used)
        flash, n_ubatch = attention_defaults(self.n_ctx, self.n_head, self.model.expert_bytes, token_bytes)
        o = self.options
        n_ubatch = min(o.n_ubatch or n_ubatch, self.n_ctx)
        for kind in (o.cache_type_k, o.cache_type_v):
            if kind not in CACHE_TYPES:
                raise UnknownName(f"unknown type '{kind}' of the KV cache; known: {', '.join(CACHE_TYPES)}")
        if o.lossy_cache and o.flash_attn is False:
            raise UsageError(f"{o.lossy_cache} needs flash attention; leave out --no-flash-attn")
        if o.lossy_cache:
            return True, n_ubatch
        return flash if o.flash_attn is None else o.flash_attn, n_ubatch

    def _arguments(self, placement: Placement | None) -> dict[str, Any]:
        o = self.options
        arguments: dict[str, Any] = {
            "model_path": AnyPath(self.model.skeleton),
            "n_ctx": self.n_ctx,
            "n_batch": self.n_ubatch,
            "n_ubatch": self.n_ubatch,
            "n_threads": o.threads(),
            "n_threads_batch": o.threads(),
            "n_gpu_layers": 0,
            "use_mmap": self._mapped,
            "logits_all": o.logits_all,
            "flash_attn": self.flash_attn,
            "type_k": CACHE_TYPES[o.cache_type_k],
            "type_v": CACHE_TYPES[o.cache_type_v],
            "verbose": o.verbose,
        }
        if placement is not None:
            arguments |= {"n_gpu_layers": placement.n_layers, "tensor_split": list(placement.shares)}
        if o.seed is not None:
            arguments["seed"] = o.seed
        return arguments
