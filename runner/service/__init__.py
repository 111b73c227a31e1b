"""`moe-edge serve` as a service of the machine: a systemd unit, a launchd agent; pure text, written by the command."""
