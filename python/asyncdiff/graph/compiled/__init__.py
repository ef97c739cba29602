"""Programs compiled by inductor."""
