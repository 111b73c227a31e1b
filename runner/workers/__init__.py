"""One model on several boards: each computes some of its layers, with experts from its own disk."""
