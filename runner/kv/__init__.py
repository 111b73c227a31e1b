"""What was computed once: the KV cache of a conversation, kept in memory by checkpoints and on disk by state files."""
