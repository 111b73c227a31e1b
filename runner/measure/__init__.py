"""What a model or this machine does: plan, probe, doctor, bench, evaluation, traces and their simulation."""
