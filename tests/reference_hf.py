"""Random models of every class that is converted, by transformers; and what llama.cpp's own converter makes of them.

Run by the interpreter of build/reference (`make reference`), never in the process of the tests: torch brings an OpenMP
of its own.

    reference_hf.py models FOLDER            one folder a class: checkpoint, tokenizer, logits.npz
    reference_hf.py ggufs FOLDER LLAMA_CPP   NAME.ref.gguf beside each, by the converter in that source tree
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

N_VOCAB, N_TOKENS = 512, 40
COMMON = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 128, "moe_intermediate_size": 48,
    "num_experts_per_tok": 2, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "topk_group": 1,
}  # fmt: skip
LINEAR = {
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
    "head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
GRANITE = {
    "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 6.0,
    "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip
# name of the folder -> (class, its configuration class, settings): a row for each thing that a family does differently
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig",
              {"num_key_value_heads": 4, "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96,
        "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 32, "norm_topk_prob": True}),
    "qwen3moe-tied": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3moe-yarn": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 32, "norm_topk_prob": True, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}}),
    "qwen3next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {"intermediate_size": 128, **LINEAR}),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**LINEAR, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True}}),
    "deepseek2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        **LATENT, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "topk_method": "greedy",
        "n_group": 1}),
    "deepseek2-lite": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        **LATENT, "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0,
        "topk_method": "greedy", "n_group": 1, "num_hidden_layers": 27}),  # by which llama.cpp knows it
    "deepseek3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2}),
    "kimi-k2": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **LATENT, "n_routed_experts": 12, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "routed_scaling_factor": 2.827}),
    "glm4moelite": ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", {
        **LATENT, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
        "sliding_window": 64}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", GRANITE),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig",
                         {**GRANITE, "shared_intermediate_size": 64}),
    "granitehybrid": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        **GRANITE, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}),
    "glm4moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 16, "n_group": 1, "topk_group": 1,
        "num_hidden_layers": 3}),
    "lfm2moe": ("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "ernie4_5": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", {
        "intermediate_size": 128, "moe_intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "num_hidden_layers": 3}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {
        "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16}),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {
        "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 48, "n_routed_experts": 4,
        "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3,
        "head_dim": 16}),
    "hunyuan": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config",
                {"intermediate_size": 48, "num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    "hunyuan-alpha": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {
        "intermediate_size": 48, "num_experts": 4, "moe_topk": 2, "head_dim": 16, "rope_parameters": {
            "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}}),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {
        "intermediate_size": 96, "enable_moe_block": True, "moe_intermediate_size": 48, "num_experts": 4,
        "top_k_experts": 2, "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 64,
        "vocab_size_per_layer_input": N_VOCAB, "hidden_size_per_layer_input": 32}),
}  # fmt: skip
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|x|>")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 512 tokens with GPT-2's pre-tokenizer."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = {byte: chr(byte if byte in kept else next(others)) for byte in range(256)}
    vocab = {letters[byte]: byte for byte in range(256)}
    pairs = itertools.islice(itertools.product("etaoinshrdlu", "etaoinshrdlucmfwypvbgk"), N_VOCAB - 256 - len(SPECIAL))
    merges = []
    for left, right in pairs:
        vocab[left + right] = len(vocab)
        merges.append(f"{left} {right}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": len(vocab) + i, "content": text, "special": True, **flags} for i, text in enumerate(SPECIAL)]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }))  # fmt: skip
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_models(folder: Path) -> None:
    import numpy as np
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name, (kind, config_kind, settings) in MODELS.items():
        config = getattr(transformers, config_kind)(**{**COMMON, **settings})
        model = getattr(transformers, kind)(config).float().eval()
        with torch.no_grad():
            for tensor_name, tensor in model.named_parameters():
                if tensor.dim() == 1:
                    tensor.copy_(torch.randn_like(tensor) * 0.1 + (1.0 if "norm" in tensor_name else 0.0))
                else:
                    # routers that are sure of themselves: rounding must not choose between two experts
                    is_router = re.search(r"(router|gate|wg)(\.proj|\.layer)?\.weight$", tensor_name) is not None
                    tensor.copy_(torch.randn_like(tensor) * (0.5 if is_router else 0.08))
            for tensor_name, tensor in model.named_buffers():
                if "bias" in tensor_name:  # of the experts' selection
                    tensor.copy_(torch.rand_like(tensor) * 0.2)
            ids = torch.randint(0, N_VOCAB, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
            logits = model(ids).logits[0].numpy()
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        np.savez(folder / name / "logits.npz", ids=ids[0].numpy(), logits=logits)


def write_ggufs(folder: Path, llama_cpp: Path) -> None:
    """By llama.cpp's converter, told that the pre-tokenizer is GPT-2's, whatever the family."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf  # type: ignore[import-not-found,unused-ignore]
    from conversion import ModelBase, TextModel, get_model_class  # type: ignore[import-not-found,unused-ignore]

    def plain_vocabulary(self: Any) -> None:
        self._set_vocab_gpt2()

    TextModel.get_vocab_base_pre = ModelBase.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for name in MODELS:
        try:
            settings = ModelBase.load_hparams(folder / name, False)
            kind = get_model_class(settings["architectures"][0])
            kind.set_vocab, kind.no_mtp = plain_vocabulary, True
            kind(folder / name, gguf.LlamaFileType.ALL_F32, folder / f"{name}.ref.gguf", eager=True).write()
        except Exception as error:  # a class, or a setting, that it cannot read: said, and for the test to know
            (folder / f"{name}.why_not").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    what, target, *rest = sys.argv[1:]
    if what == "models":
        write_models(Path(target))
    else:
        write_ggufs(Path(target), Path(rest[0]))
