"""Continue a text with a model under a memory budget: generate.py [MODEL.gguf] [RAM]."""

import sys

import moe_edge

path, ram = [*sys.argv[1:], None, None][:2]
with moe_edge.load(path, ram=ram, n_ctx=512) as model:
    for line in model.plan.lines():
        print(line)
    reply = model.generate("The king said", 32, temp=0)
    print(reply.text)
    print(f"{reply.tokens_per_second:.1f} tok/s, {100 * reply.expert_hit_rate:.0f} % of the experts were in memory")
