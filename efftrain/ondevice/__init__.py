"""The compiler for training on microcontrollers."""
