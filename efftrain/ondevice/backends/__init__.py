"""What runs a program: NumPy, the host's processor, an emulated board. All three leave the same bits."""
