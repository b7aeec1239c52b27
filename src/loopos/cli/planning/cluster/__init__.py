"""What a run takes of a cluster: its GPUs, memory and traffic, and the smallest setting that fits."""
