"""Generation: sampling keyed by (seed, position), the calculator, text pieces and the KV-cached engine. No Ray."""
