"""What moves between ranks: boundaries and noise predictions, laid out, sent and taken."""
