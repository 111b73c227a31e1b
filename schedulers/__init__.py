"""The policy: state in, decision out. No I/O, no ctypes, no llama.cpp."""
