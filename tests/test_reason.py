"""The line of llama.cpp's log that explains, out of logs as they were printed."""

from __future__ import annotations

import signal

import pytest
from moe_edge.runner.reason import ending, reason, refusal

SOURCES = "/tmp/pip-install-z49h519c/llama-cpp-python_3a300bfb32c34d5198489d04c189dfd6/vendor/llama.cpp/"

LOADING = """\
llama_model_load: error loading model: {}
llama_model_load_from_file_impl: failed to load model
"""

REFUSED = {
    "check_tensor_dims: tensor 'blk.2.ffn_gate_inp.weight' not found":
        "tensor 'blk.2.ffn_gate_inp.weight' not found",
    "check_tensor_dims: tensor 'output.weight' has wrong shape; expected   256,   512, got   256,   100,     1,     1":
        "tensor 'output.weight' has wrong shape; expected 256, 512, got 256, 100, 1, 1",
    "done_getting_tensors: wrong number of tensors; expected 27, got 15":
        "wrong number of tensors; expected 27, got 15",
    "error loading model vocabulary: unknown pre-tokenizer type: 'klingon'":
        "unknown pre-tokenizer type: 'klingon'",
    "error loading model hyperparameters: key qwen3moe.embedding_length has wrong type str but expected type u32":
        "key qwen3moe.embedding_length has wrong type str but expected type u32",
    "error loading model architecture: unknown model architecture: 'klingon'":
        "unknown model architecture: 'klingon'",
    "llama_model_loader: failed to load model from /home/x/y.gguf": "failed to load model from /home/x/y.gguf",
}  # fmt: skip

DIED = [
    (
        f"{SOURCES}src/llama-model.cpp:1362: GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed\n",
        "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed (llama-model.cpp:1362)",
    ),
    (f"{SOURCES}src/llama-graph.cpp:2072: fatal error\n", "fatal error (llama-graph.cpp:2072)"),
    (
        f"{SOURCES}ggml/src/ggml-cpu/binary-ops.cpp:135: binary_op: unsupported types: dst: f32, src1: f16\n",
        "binary_op: unsupported types: dst: f32, src1: f16 (binary-ops.cpp:135)",
    ),
    (
        "terminate called after throwing an instance of 'std::out_of_range'\n  what():  unordered_map::at\n",
        "unordered_map::at",
    ),
    ("terminate called after throwing an instance of 'std::bad_alloc'\n", "std::bad_alloc"),
    # a warning before, a debugger's backtrace behind
    (
        "load: special_eos_id is not in special_eog_ids - the tokenizer config may be incorrect\n"
        f"{SOURCES}ggml/src/ggml.c:1797: GGML_ASSERT(view_src == NULL || data_size == 0) failed\n"
        "[New LWP 17]\n#0  0x00007f in wait4 () from /lib/x86_64-linux-gnu/libc.so.6\n",
        "GGML_ASSERT(view_src == NULL || data_size == 0) failed (ggml.c:1797)",
    ),
]


@pytest.mark.parametrize("said", REFUSED)
def test_the_first_cause_is_taken_and_not_what_failed_because_of_it(said: str) -> None:
    assert reason(LOADING.format(said), 1) == REFUSED[said]


@pytest.mark.parametrize(("log", "why"), DIED)
def test_what_was_said_on_dying_is_taken(log: str, why: str) -> None:
    assert reason(log, -signal.SIGABRT) == why


def test_an_assertion_after_an_earlier_error_is_what_killed_the_process() -> None:
    log = LOADING.format("tensor 'x' not found") + DIED[0][0]
    assert reason(log, -signal.SIGABRT) == DIED[0][1]
    assert reason(log, 1) == "tensor 'x' not found"


def test_a_context_that_cannot_be_made_says_why() -> None:
    log = "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache\n"
    assert reason(log, 1) == "failed to allocate buffer for kv cache"


def test_lines_may_come_in_pieces() -> None:
    pieces = ["llama_model_load: error loading", " model: ", "key not found in model: olmoe.block_count", "\n"]
    assert reason(pieces, 1) == "key not found in model: olmoe.block_count"


def test_nothing_is_made_up() -> None:
    assert reason("", -signal.SIGSEGV) == ""
    assert reason("llama_model_load_from_file_impl: failed to load model\nFailed to load model from file: x\n", 1) == ""
    assert reason("llama_context: n_ctx_seq (64) < n_ctx_train (2048)\n", -signal.SIGSEGV) == ""


def test_a_reason_is_never_endless() -> None:
    assert len(reason(LOADING.format("tensor '" + "x" * 100_000 + "' not found"), 1)) < 500


def test_an_ending_without_words_is_named() -> None:
    assert ending(-signal.SIGSEGV) == "llama.cpp crashed (SIGSEGV)"
    assert "memory ran out" in ending(-signal.SIGKILL)
    assert ending(3) == "llama.cpp ended with status 3"
    assert "signal 200" in ending(-200)


def test_a_refusal_names_the_file_the_reason_and_the_way_out() -> None:
    said = refusal("a.gguf", "tensor 'x' not found")
    assert said.startswith("a.gguf: ") and "tensor 'x' not found" in said and said.endswith("convert it anew")
