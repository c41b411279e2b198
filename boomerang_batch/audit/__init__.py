"""What is asked of a finished output: how private it is, how good, where an image came from, and to prove it.

Composes runs and trials (`run`) with measures; the command line calls it and prints what it says.
"""
