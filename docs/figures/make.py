"""Draws every picture of the documentation again: python docs/figures/make.py."""

import blocks
import curves
import iteration
import plots

for module in (iteration, blocks, plots, curves):
    module.main()
