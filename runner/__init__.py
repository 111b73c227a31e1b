"""llama.cpp, the engine binding, generation, chat and the command line."""
