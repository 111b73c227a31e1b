"""Measuring a model while it is converted: what each type does to each expert, and what settings cost."""
