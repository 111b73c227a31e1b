"""How fast a model is at several budgets, and that its words are the same at all of them: budget.py [MODEL.gguf]."""

import sys

import moe_edge

path = sys.argv[1] if len(sys.argv) > 1 else None
with moe_edge.load(path, n_ctx=512) as model:
    plan = model.plan
answers = set()
for ram in (plan.floor_bytes, (plan.floor_bytes + plan.resident_bytes) // 2, plan.resident_bytes):
    with moe_edge.load(path, ram=ram, n_ctx=512) as model:
        reply = model.generate("In the beginning", 24, temp=0)
        answers.add(reply.text)
        print(f"{ram / 2**20:6.1f} MiB: {100 * reply.expert_hit_rate:5.1f} % hits, {reply.bytes_read} bytes read")
print("the same text at every budget" if len(answers) == 1 else "the texts differ, which is a fault")
