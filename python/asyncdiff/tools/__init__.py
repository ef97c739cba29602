"""What helps to choose settings: doctor, tune, fidelity, compare."""
