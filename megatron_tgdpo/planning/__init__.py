"""What a run costs on paper: activations, workspace, traffic, step time, and the layouts that fit a cluster."""
