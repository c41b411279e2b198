"""Pure numbers about outputs and their sources: how well they link, how alike they are, what is certified.

Arrays in, small frozen dataclasses out. Nothing here reads a file, knows a recipe or draws from a global
generator: what is drawn comes from a seed, so equal arrays give equal numbers. Every measured number carries
its interval and how many trials it rests on; what can't be measured is nan, and what would mean nothing raises
MeasureError. Who may be compared with whom is the caller's to say, by `groups`: records of equal group agree
in all that is released of them besides the picture.
"""
