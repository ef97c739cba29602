"""The commands, one file each. What they share lies above."""
