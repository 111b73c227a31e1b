"""The commands of `moe-edge`, one file each; runner/cli.py registers them."""
