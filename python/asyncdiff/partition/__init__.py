"""Who owns which node of a denoiser: costs, balance, cuts, report."""
