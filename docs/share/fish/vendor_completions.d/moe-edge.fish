# Read by fish at the first Tab key after moe-edge; the program itself says how to go on.
moe-edge completion fish | source
