"""Models that come from elsewhere and go elsewhere."""
