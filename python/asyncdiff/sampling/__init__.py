"""What a sampler is given in a step: clean images, predictors, calibration, automatic warm-up."""
