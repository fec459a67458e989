"""What fits on TPU slices, and compiles for them: programs compiled ahead of time, without TPU."""
