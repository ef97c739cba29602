"""One file for each way to move a bundle from one rank to others."""
