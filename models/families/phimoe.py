"""Phi-3.5-MoE: its GGUF runs as llama.cpp runs it; its checkpoints are not converted."""

from __future__ import annotations

from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Family

# Measured on a random model of two layers: mean KLD 4e-2 between transformers and llama.cpp's graph.
MIXED = (
    "its router is a SparseMixer, which gives each of its two experts a weight near 1, and llama.cpp computes with a "
    "softmax over all experts instead"
)

FAMILY = Family(
    "phimoe",
    (Architecture("phimoe", DENSE_WIDTH),),
    refused_classes={"PhimoeForCausalLM": MIXED, "PhiMoEForCausalLM": MIXED},
    order=80,
)
