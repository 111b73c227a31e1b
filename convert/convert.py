"""A conversion from end to end: checkpoint or GGUF in, skeleton and expert store out.

Reads and writes a bounded piece at a time, reads everything back, and leaves either both files or none.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_edge.convert.arriving import Arriving, identity_of, left_of
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ConvertPlan, ExpertTypes, PlannedTensor, change, make_plan
from moe_edge.convert.imatrix import fill_unused
from moe_edge.convert.quantize import check_importance
from moe_edge.convert.stream import converted, packed
from moe_edge.convert.write_store import new_store, seal_store
from moe_edge.models.errors import MissingFile, MoeEdgeError, UsageError, printable
from moe_edge.models.formats.files import is_present, stamp_of
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import BF16, BY_NAME, F16, F32
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.work import WorkFolder, renamed_in
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, check_space, kv_string, kv_u32
from moe_edge.models.store.experts import MatrixKey
from moe_edge.models.store.folder import STORE_SUFFIX, is_folder
from moe_edge.models.store.skeleton import own_kvs, skeleton_kvs, stub_data
from moe_edge.models.store.source import STORE_ID, Source, computed_layers
from moe_edge.models.store.store import expert_name, open_model, store_path

if TYPE_CHECKING:
    from moe_edge.models.calibration import Calibration

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

MAX_THREADS = 16  # each holds about 30 MiB; memory stays below 1 GiB
FILE_TYPE = "general.file_type"
# llama.cpp's LLAMA_FTYPE of a file whose matrices are mostly of a type
FILE_TYPES = {
    F32: 0, F16: 1, BF16: 32,
    **{BY_NAME[name].id: number for name, number in (
        ("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 7), ("Q5_0", 8), ("Q5_1", 9), ("Q2_K", 10), ("Q3_K", 12), ("Q4_K", 15),
        ("Q5_K", 17), ("Q6_K", 18), ("IQ4_NL", 25), ("IQ3_S", 26), ("IQ4_XS", 30), ("TQ1_0", 36), ("TQ2_0", 37),
        ("MXFP4", 38),
    )},
}  # fmt: skip


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. After a dry run the paths are None and the plan is all there is."""

    plan: ConvertPlan
    skeleton: Path | None = None
    store: Path | None = None
    store_id: str = ""
    skeleton_bytes: int = 0
    store_bytes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    packed_share: float = 1.0  # stored bytes of the packed matrices over their bytes in memory

    def text(self) -> str:
        """The plan after a dry run, otherwise what was written."""
        if self.skeleton is None or self.store is None:
            return self.plan.text()
        changed = Counter(change(each) for each in self.plan.experts)
        lines = [
            f"{printable(str(self.skeleton))}: skeleton, {self.skeleton_bytes / 2**20:.2f} MiB",
            f"{printable(str(self.store))}: experts, {self.store_bytes / 2**20:.2f} MiB, id {self.store_id}",
            "experts: " + ", ".join(f"{count} x {what}" for what, count in changed.items()),
            *self.plan.level_lines(),
            *self._packed_lines(),
            *self.plan.remarks(),
            *self.notes,
            f"written, read back and checked in {self.seconds:.1f} s",
        ]
        return "\n".join(lines)

    def _packed_lines(self) -> list[str]:
        whole = sum(each.nbytes for each in self.plan.experts if each.packed)
        if not whole:
            return []
        return [f"packed without loss: {whole / 2**20:.2f} MiB in {100 * self.packed_share:.1f} % of it"]

    def to_json(self) -> dict[str, Any]:
        """Everything, the plan tensor by tensor, as JSON values."""
        return {
            "skeleton": str(self.skeleton) if self.skeleton else None,
            "store": str(self.store) if self.store else None,
            "store_id": self.store_id,
            "skeleton_bytes": self.skeleton_bytes,
            "store_bytes": self.store_bytes,
            "seconds": self.seconds,
            "packed_share": self.packed_share,
            "notes": list(self.notes),
            "plan": self.plan.to_json(),
        }


def convert(
    source_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str] | None,
    type: str | None = None,
    dense_type: str | None = None,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    *,
    low_type: str | None = None,
    types: ExpertTypes | None = None,
    importance: Mapping[MatrixKey, FloatArray] | None = None,
    dense_importance: Mapping[str, FloatArray] | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    prove: Callable[[Path], None] | None = None,
    pack: str = "none",
    arriving: Arriving | None = None,
) -> ConvertReport:
    """Convert a GGUF or a Hugging Face folder to `NAME.gguf` (output_path) and `NAME.experts.gguf`.

    type: ggml type of the experts; None keeps the source's bytes. low_type: adds a low level of that type.
    types: in place of both, when projections or experts differ in type.
    importance: (layer number, expert, projection) -> (n_cols,) mean squares of its inputs, for the quantizer at every
    level; an expert without gets its layer's mean. dense_importance: the same by name of the dense tensor.
    calibration: what the policies will use, stored with the experts.
    pack: which experts are packed without loss, see make_plan: "none", "auto" or "planes".
    dense_type: type of the dense matrices, see make_plan. threads: to quantize with; None or 0: one each CPU.
    output_path: None only for a dry run, which writes nothing and returns the plan.
    progress: called with bytes written and bytes in all; None shows a bar when stderr is a terminal.
    arriving: brings the source's bytes as they are read, and keeps what is written should this be stopped.
    prove: called with the skeleton, its store beside it, before they get their names; when it raises, both are gone.
    Raises NotMoE, UnknownName, UsageError (output in the way, a moe-edge file as source, types, an importance or a
    calibration of another model), MissingFile, DiskFull, BadFile and its kind: for an importance that does not fit its
    tensor, BadChecksum when the files do not read back as they were written.
    """
    started = time.monotonic()
    if output_path is None and not dry_run:
        raise UsageError(f"{source_path}: an output is needed, like olmo.gguf")
    source = open_source(source_path)
    skeleton_path = None if output_path is None else Path(output_path)
    if skeleton_path is not None:
        check_output(skeleton_path, source, overwrite)
    filled = fill_unused(_checked(importance or {}, source), source.layers)
    dense_weights = dense_importance or {}
    plan = make_plan(
        source, type, dense_type, low_type, types=types, importance=filled.keys(),
        dense_importance=dense_weights.keys(), pack=pack,
    )  # fmt: skip
    weights = _importance_by_name(plan, filled, dense_weights)
    if calibration is not None:
        _check_calibration(calibration, plan, source)
    if dry_run or skeleton_path is None:
        return ConvertReport(plan)
    note = _prove_tokenizer(Path(source_path), source)
    names = (store_path(skeleton_path).name, skeleton_path.name)
    with WorkFolder(skeleton_path.parent, names) as work:
        store, skeleton = _outputs(plan, source, skeleton_path, calibration, work.path)
        beside, what = 0, str(skeleton_path)
        if arriving is not None:
            whole = arriving.resume(identity_of(store, skeleton))
            store, skeleton = _outputs(plan, source, skeleton_path, calibration, arriving.folder, whole)
            beside = arriving.begin(left_of(plan, len(whole[0]), len(whole[1])))
            beside -= sum(each.part.stat().st_size for each in (store, skeleton) if each.checksums)
            what = f"{skeleton_path}, with two layers on their way,"
        check_space(skeleton_path.parent, store.total_bytes + skeleton.total_bytes + beside, what)
        total = sum(each.nbytes for each in plan.store_tensors) + sum(each.nbytes for each in skeleton.tensors)
        with _progress(progress, total, printable(skeleton_path.name)) as advance:
            identity = _write_both(plan, source, store, skeleton, weights, _n_threads(threads), advance, arriving)
        _check_written(store, skeleton, prove)
        if arriving is not None:
            arriving.check()
            for each in (store, skeleton):
                os.replace(each.part, work.path / each.part.name)
        work.commit(lambda: check_output(skeleton_path, source, overwrite))
        if arriving is not None:
            arriving.finished()
    return ConvertReport(
        plan=plan,
        skeleton=skeleton_path,
        store=store.path,
        store_id=identity,
        skeleton_bytes=skeleton.total_bytes,
        store_bytes=store.total_bytes,
        seconds=time.monotonic() - started,
        notes=(note,) if note else (),
        packed_share=_packed_share(plan, store),
    )


def _packed_share(plan: ConvertPlan, store: GGUFOutput) -> float:
    pairs = [(each.nbytes, spec.nbytes) for each, spec in zip(plan.experts, store.tensors, strict=False) if each.packed]
    return sum(stored for _, stored in pairs) / sum(whole for whole, _ in pairs) if pairs else 1.0


def _prove_tokenizer(folder: Path, source: Source) -> str | None:
    """What could not be checked of a checkpoint's tokenizer. Raises UnknownName when llama.cpp reads text otherwise."""
    if not source.is_checkpoint:
        return None
    from moe_edge.convert.tokenizer_proof import check_tokenizer

    records = {key: source.kv.record(key) for key in source.kv if key.startswith("tokenizer.")}
    return check_tokenizer(folder, records, source.kv.get("tokenizer.ggml.pre"))


def check_output(skeleton: Path, source: Source, overwrite: bool) -> None:
    """Raise UsageError for an output that is no name of a skeleton or is in the way, MissingFile without its folder."""
    if skeleton.suffix != ".gguf" or skeleton.name.endswith(STORE_SUFFIX) or is_folder(skeleton):
        raise UsageError(f"{skeleton}: the output must be the name of a skeleton, like olmo.gguf")
    if not is_folder(skeleton.parent):
        raise MissingFile(f"{skeleton.parent}: no such folder to write {skeleton.name} to")
    for path in (skeleton, store_path(skeleton)):
        if not is_present(path):
            continue
        found = stamp_of(path)
        if any(found[:2] == stamp_of(each)[:2] for each in source.files):
            raise UsageError(f"{path}: is the source itself; choose another output")
        if not overwrite:
            raise UsageError(f"{path}: exists already; choose another output, or allow to overwrite it")


def _checked(importance: Mapping[MatrixKey, FloatArray], source: Source) -> dict[MatrixKey, FloatArray]:
    """`importance` as float32, each fitting the rows of its tensor. Raises BadFile, UsageError for unknown experts."""
    checked = {}
    for key, values in importance.items():
        what = f"{key[2]} of expert {key[1]} in layer {key[0]}"
        if key not in source.experts:
            raise UsageError(f"{source.name} has no {what}, which has an importance")
        checked[key] = check_importance(values, source.experts[key].shape[0], f"importance of {what}")
    return checked


def _check_calibration(calibration: Calibration, plan: ConvertPlan, source: Source) -> None:
    if calibration.levels != plan.levels:
        raise UsageError(
            f"{source.name}: the calibration is of the levels {list(calibration.levels)}, "
            f"the conversion makes {list(plan.levels)}"
        )
    layers = computed_layers(source.kv, source.layers)
    needed = (len(layers), max(layer.n_expert for layer in layers))
    if calibration.counts.shape != needed:
        raise UsageError(
            f"{source.name}: the calibration is of {list(calibration.counts.shape)} layers and experts, "
            f"the model has {list(needed)}"
        )


def _importance_by_name(
    plan: ConvertPlan, importance: Mapping[MatrixKey, FloatArray], dense: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """Planned tensor -> importance of its columns. Raises BadFile for one that does not fit its dense tensor."""
    by_name = {
        expert_name(layer, projection, expert, level): values
        for (layer, expert, projection), values in importance.items()
        for level in plan.levels
    }
    for each in plan.dense:
        if each.is_converted and each.name in dense:
            where = f"importance of tensor '{each.name}'"
            by_name[each.name] = check_importance(dense[each.name], each.shape[0], where)
    return by_name


def _outputs(
    plan: ConvertPlan, source: Source, skeleton_path: Path, calibration: Calibration | None, folder: Path,
    whole: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
) -> tuple[GGUFOutput, GGUFOutput]:  # fmt: skip
    """Store and skeleton, to be written in `folder`. whole: what of them is there, as GGUFOutput has it."""
    final = store_path(skeleton_path)
    store = new_store(
        final,
        source.architecture.name,
        source.name,
        source.header_sha256,
        plan.levels,
        [each.spec for each in plan.store_tensors],
        calibration,
        folder / final.name,
        {each.name: (each.codec, each.type, each.shape[0], each.shape[1]) for each in plan.experts if each.packed},
        whole[0],
    )
    changed = {}
    if source.is_checkpoint and plan.dense_type in FILE_TYPES:
        changed[FILE_TYPE] = kv_u32(FILE_TYPE, FILE_TYPES[plan.dense_type])
    kvs = skeleton_kvs(source, own_kvs("0" * 32, source.name), changed)
    specs = [each.spec for each in plan.dense]
    part = folder / skeleton_path.name
    return store, GGUFOutput(skeleton_path, kvs, (*specs, *plan.stubs), source.alignment, part, whole[1])


def _write_both(
    plan: ConvertPlan,
    source: Source,
    store: GGUFOutput,
    skeleton: GGUFOutput,
    weights: Mapping[str, FloatArray],
    threads: int,
    advance: Callable[[int], None],
    arriving: Arriving | None = None,
) -> str:
    """Write and check both files. Returns the store id."""
    experts, dense = plan.store_tensors[len(store.checksums) :], plan.dense[len(skeleton.checksums) :]
    stubs = plan.stubs[max(0, len(skeleton.checksums) - len(plan.dense)) :]

    def told(nbytes: int) -> None:
        advance(nbytes)
        if arriving is not None:
            arriving.written(store, skeleton)

    with (arriving.files if arriving else SourceFiles)(source.stamps) as files, store, skeleton:
        _fill_store(store, experts, converted(experts, files, threads, weights), threads, told)
        identity = seal_store(store)
        skeleton.patch(STORE_ID, kv_string(STORE_ID, identity))
        _fill(skeleton, _skeleton_data(dense, stubs, files, weights, threads), told)
        files.check_unchanged()
        skeleton.finish()
        store.verify()
        skeleton.verify()
        store.close()
        skeleton.close()
    return identity


def _check_written(store: GGUFOutput, skeleton: GGUFOutput, prove: Callable[[Path], None] | None) -> None:
    """Open the converted model as the runtime will, then prove it as the caller wants; errors have the final names."""
    try:
        open_model(skeleton.part)
        if prove is not None:
            prove(skeleton.part)
    except MoeEdgeError as error:
        names = [(skeleton.part, skeleton.path), (store.part, store.path)]
        raise renamed_in(error, names) from error.__cause__


def _fill(output: GGUFOutput, pieces: Generator[bytes, None, None], advance: Callable[[int], None]) -> None:
    """Write all pieces. However it ends, no thread reads the sources afterwards."""
    with closing(pieces):
        for data in pieces:
            output.write(data)
            advance(len(data))


def _fill_store(
    store: GGUFOutput,
    experts: Sequence[PlannedTensor],
    pieces: Generator[bytes, None, None],
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """The same for the store, whose experts may be packed."""
    tensors = iter(experts)
    current = next(tensors, None)
    with closing(packed(experts, pieces, threads)) as stored:
        for data, ends in stored:
            assert current is not None
            if current.packed:
                store.write_shorter(data)
            else:
                store.write(data)
            advance(current.nbytes if current.packed else len(data))
            current = next(tensors, None) if ends else current


def _skeleton_data(
    dense: Sequence[PlannedTensor], stubs: Sequence[TensorSpec], files: SourceFiles, weights: Mapping[str, FloatArray],
    threads: int,
) -> Generator[bytes, None, None]:  # fmt: skip
    yield from converted(dense, files, threads, weights)
    for stub in stubs:
        yield from stub_data(stub.nbytes)


def _n_threads(threads: int | None) -> int:
    if not threads:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(usable, MAX_THREADS)
    if threads < 0:
        raise UsageError(f"threads = {threads}: at least 1 is needed, or 0 for one each CPU")
    return min(threads, MAX_THREADS)


@contextmanager
def _progress(progress: Progress | None, total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes just written."""
    if progress is not None:
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        yield advance
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, file=sys.stderr) as bar:
            yield lambda nbytes: bar.update(nbytes) and None
    else:
        yield lambda nbytes: None
