"""A conversation, printed as it comes: chat.py [MODEL.gguf]. A model without a chat template continues the text."""

import sys

import moe_edge
from moe_edge.runner.chatformat.parts import Reasoning, Text

with moe_edge.load(sys.argv[1] if len(sys.argv) > 1 else None, n_ctx=1024) as model:
    messages = [{"role": "user", "content": "Tell me about the king."}]
    try:
        events = model.stream(messages, 64, temp=0.7, seed=1)
        for event in events:
            if isinstance(event, Text | Reasoning):
                print(event.text, end="", flush=True)
            elif isinstance(event, moe_edge.Done):
                print(f"\n[{event.reply.generated_tokens} tokens, {event.reply.finish_reason}]")
    except moe_edge.UsageError as error:  # a base model has no template
        print(f"{error}\n{model.generate(messages[0]['content'], 64, temp=0).text}")
