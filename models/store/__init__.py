"""A model on disk: its experts and their names, the skeleton that llama.cpp loads, and opening both."""
