"""A stock GGUF, with stacked expert tensors, from a checkpoint: what any llama.cpp loads.

    python -m moe_edge.convert.stacked CHECKPOINT OUT.gguf [TYPE]

This is how the embedded tiny model was made, and how benchmarks and tests get the same weights for stock llama.cpp.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ConvertPlan, PlannedTensor, make_plan
from moe_edge.convert.stream import converted
from moe_edge.models.errors import BadFile, MoeEdgeError
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput, TensorSpec
from moe_edge.models.store.source import Source


def write_stacked(source_path: Path, output: Path, type: str | None = None, dense_type: str | None = None) -> Path:
    """Write a stock GGUF. type, dense_type: as in convert(). Raises what convert() raises, and BadFile when the
    experts of one tensor would have different types."""
    source = open_source(source_path)
    plan = make_plan(source, type, dense_type)
    groups = list(_stacks(source, plan))
    specs = [each.spec for each in plan.dense] + [_stacked_spec(group) for group in groups]
    specs += [each.spec for each in plan.biases]
    tensors = [*plan.dense, *itertools.chain.from_iterable(groups), *plan.biases]
    kvs = {key: source.kv.record(key) for key in source.kv if not key.startswith("split.")}
    with SourceFiles() as files, GGUFOutput(output, kvs, specs, source.alignment) as out:
        for data in converted(tensors, files, os.cpu_count() or 1):
            out.write(data)
        out.finish()
        out.verify()
        out.commit()
    return output


def _stacks(source: Source, plan: ConvertPlan) -> Iterator[list[PlannedTensor]]:
    """The experts of one stacked tensor at a time, expert 0 first."""
    by_name = {each.name: each for each in plan.experts}
    for layer in source.layers:
        for projection in layer.projections:
            name = f"blk.{layer.layer}.ffn_{projection}_exps"
            yield [by_name[f"{name}.{expert}.weight"] for expert in range(layer.n_expert)]


def _stacked_spec(group: list[PlannedTensor]) -> TensorSpec:
    first = group[0]
    name = first.name.rsplit(".", 2)[0] + ".weight"
    if any(each.type != first.type or each.shape != first.shape for each in group):
        raise BadFile(f"{name}: its experts have different types or shapes, which a stacked tensor cannot hold")
    return TensorSpec(name, (*first.shape, len(group)), first.type, sum(each.nbytes for each in group))


if __name__ == "__main__":
    try:
        print(write_stacked(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
    except MoeEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
