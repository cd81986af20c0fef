"""The evidence: arms trained alike on one GPU, measured with every control, several seeds."""
