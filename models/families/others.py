"""Architectures of which only a GGUF is taken, and those that are known not to work."""

from __future__ import annotations

from moe_edge.models.families.family import DENSE_WIDTH, Architecture, Family

DIFFUSION = "it writes by diffusion, all tokens at once and without a KV cache; llama.cpp's llama-diffusion-cli runs it"

FAMILY = Family(
    "others",
    (
        *(
            Architecture(name)
            for name in ("grok grovemoe maple mellum mimo2 nemotron_h_moe smallthinker step35".split())
        ),
        *(Architecture(name, DENSE_WIDTH) for name in "arctic dbrx mistral3".split()),
        *(Architecture(name, count_times_width=True) for name in "afmoe bailingmoe".split()),
        *(Architecture(name, state_shared_width=True) for name in "cohere2moe laguna exaone-moe".split()),
        *(
            Architecture(name, count_times_width=True, shared_width_wins=True)
            for name in ("bailingmoe2", "bailingmoe3")
        ),
    ),
    # Tried, and known not to work: stubs of width 1 would change the shape of dense tensors.
    refused={
        "llada-moe": DIFFUSION,
        "rnd1": DIFFUSION,
        "llama4": "its shared expert has the width of the experts and no key of its own",
        "jamba": "its dense layers have the width of the experts",
    },
    order=1000,
)
