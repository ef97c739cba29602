"""What layers do that the exporter does not follow by itself."""
