"""The processes that a denoiser is spread over: how they meet, and what they say alike."""
