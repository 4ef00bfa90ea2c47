"""What a run reports, and when it stops: metrics, divergence, samples and signals."""
